"""Processes that ``torchrun`` started for one training: the first leads, the others join it where a flow is trained."""

from __future__ import annotations

import os


def rank() -> int:
    """Return which of the processes this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_processes() -> int:
    """Return how many of the processes run on this machine; 1 without torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this process does what is done once: simulate, write, report."""
    return rank() == 0
