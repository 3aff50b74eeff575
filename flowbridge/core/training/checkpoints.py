"""The checkpoint format of training: one safetensors file of tensors, with everything else as JSON in its header.

A checkpoint is written whole or not at all, and nothing in it is unpickled when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic_files import write_whole
from ..errors import ModelFileError

_FORMAT = "flowbridge training checkpoint 2"
_TENSOR = "$tensor"  # stands in the JSON for a tensor, with its name
_INTEGERS = "$integers"  # stands there for a mapping whose keys are integers, as states of optimisers have
_EARLIER = ("step.ckpt", "training.ckpt")  # names of earlier versions


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; an existing file is replaced when the new one is complete.

    Args:
        path: of the file; its folder is made.
        state: mappings (of strings, or of integers) and lists, one within the other, of tensors and plain data.

    Raises:
        ModelFileError: when the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(state, "", tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(tensors, {"format": _FORMAT, "state": text}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what :func:`write_checkpoint` was given (tuples as lists).

    Raises:
        ModelFileError: when the file is no checkpoint, is damaged, or was written by an earlier version.
    """
    try:
        with path.open("rb") as opened:
            pickled = opened.read(2) == b"PK"  # the archives of torch.save
        if pickled:
            raise earlier_version(path, path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: torch's own memory is aligned, and results of linear algebra may depend on that.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("format") == "flowbridge training checkpoint 1":
            raise earlier_version(path, path)
        if metadata.get("format") != _FORMAT:
            raise ModelFileError(f"{path}: is not a {_FORMAT!r}; remove it to start again")
        state: dict[str, Any] = _with_tensors(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{path}: is no readable checkpoint ({error}); remove it to start again") from error
    return state


def checkpoint_in(folder: Path) -> Path:
    """Return the file of a training that has a folder of its own.

    Raises:
        ModelFileError: when the folder holds a checkpoint of an earlier version.
    """
    for name in _EARLIER:
        if (folder / name).exists():
            raise earlier_version(folder / name, folder)
    return folder / "checkpoint.safetensors"


def earlier_version(path: Path, removable: Path) -> ModelFileError:
    """Return the error for a checkpoint of an earlier version.

    Args:
        path: of the checkpoint.
        removable: what has to go for the training to start again.
    """
    return ModelFileError(
        f"{path}: this checkpoint was written by an earlier version of flowbridge, in a format that is not read any more. "
        f"Finish the training with that version, or remove {removable} to start it again"
    )


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors of a checkpoint are called {name}")
        # Copies: one file holds no two names for the same memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        kinds = {type(key) for key in value}
        if not (kinds <= {str} or kinds == {int}):
            raise TypeError(
                f"keys of a checkpoint are all strings or all integers, got {list(value)[:5]} in {name or 'it'}"
            )
        plain = {str(key): _without_tensors(one, f"{name}/{key}", tensors) for key, one in value.items()}
        return {_INTEGERS: plain} if int in kinds else plain
    if isinstance(value, list | tuple):
        return [_without_tensors(one, f"{name}/{index}", tensors) for index, one in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_INTEGERS}:
            return {int(key): _with_tensors(one, tensors) for key, one in value[_INTEGERS].items()}
        return {key: _with_tensors(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_tensors(one, tensors) for one in value]
    return value
