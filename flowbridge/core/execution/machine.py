"""The machine that code runs on, as far as results kept between runs depend on it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch


@cache
def machine() -> dict[str, str]:
    """Return what machine code depends on: system, processor family and its instruction sets."""
    flags = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), flags)
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "instructions": hashlib.sha256(flags.encode()).hexdigest()[:16],
    }


def compiler() -> str | None:
    """Return the first line in which the C++ compiler names itself, None where there is none."""
    command = os.environ.get("CXX", "g++" if platform.system() != "Darwin" else "clang++").split()
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.partition("\n")[0] if answer.returncode == 0 else None
