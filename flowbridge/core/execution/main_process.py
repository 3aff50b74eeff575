"""Processes that ``torchrun`` started for one training: the first leads, the others join it where a flow is trained."""

from __future__ import annotations

import os


def number() -> int:
    """Return which of the processes this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def on_this_machine() -> int:
    """Return how many of the processes run on this machine; 1 without torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def leads() -> bool:
    """Return whether this process does what is done once: simulate, write, report."""
    return number() == 0
