"""Checkpoints of training outside Lightning: module, optimiser and plain data in one safetensors file, atomically.

Unlike ``torch.save`` nothing in the file is unpickled when it is read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ....core.errors import ModelFileError

_FORMAT = "flowbridge training checkpoint 1"


def save_checkpoint(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint; an existing file is replaced when the new one is complete.

    Args:
        path: of the file.
        module: what is trained.
        optimiser: any of torch whose state is tensors and plain data by parameter (not LBFGS).
        progress: plain data, such as the number of steps and the state of a merging schedule.
    """
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    state = optimiser.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    text = json.dumps({"groups": state["param_groups"], "plain": plain, "progress": dict(progress)})
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(copies, part, metadata={"format": _FORMAT, "state": text})
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load_checkpoint(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore module and optimiser from :func:`save_checkpoint` and return its ``progress``.

    Raises:
        ModelFileError: when the file is no checkpoint, is damaged, or is one of another module or optimiser.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: is no readable checkpoint ({error}); remove it to begin anew") from error
    if metadata.get("format") != _FORMAT:
        raise ModelFileError(f"{path}: is not a {_FORMAT!r}; remove it to begin anew")
    stored = json.loads(metadata["state"])
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in stored["plain"].items()}
    for name, value in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == "optimiser":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    parts = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    try:
        module.load_state_dict(parts)
        optimiser.load_state_dict({"state": state, "param_groups": stored["groups"]})
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(
            f"{path}: the checkpoint is of another module or optimiser ({error}); use the settings it was written with, or "
            "remove it to begin anew"
        ) from error
    progress: dict[str, Any] = stored["progress"]
    return progress
