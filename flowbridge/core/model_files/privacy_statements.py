"""What a model says about the privacy of its training data, and whether its tensors are still those it speaks of."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

DIGEST = "parameters_sha256"
"""Key under which a statement holds the digest of the tensors that it covers."""


def tensors_digest(module: nn.Module) -> str:
    """Return a SHA-256 of all stored tensors: names, types, shapes, bits."""
    summary = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            summary.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
            summary.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def statement_holds(module: nn.Module, statement: dict[str, Any]) -> bool:
    """Return whether a statement is about the tensors that the module has now."""
    return bool(statement.get(DIGEST) == tensors_digest(module))
