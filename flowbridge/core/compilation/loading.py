"""Load a model file the way engine adapters evaluate it: converted, placed, and compiled where that works."""

from __future__ import annotations

from pathlib import Path

import torch

from ..potential import Potential
from .building import accelerated


def load_accelerated(
    path: str | Path,
    *,
    digest: str | None = None,
    batch: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    mode: str = "auto",
) -> Potential:
    """Return the potential of a model file for evaluation.

    Args:
        path: the model file.
        digest: what the file's digest must be, if given.
        batch: number of configurations that will be evaluated at once.
        dtype: floating type (``"float32"``, ``"float64"``) to convert the parameters to; positions are to be given in it.
            None keeps the parameters, for positions in float64.
        device: torch device; None for the CPU.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.

    Raises:
        ModelFileError: when the file cannot be read or has another digest.
        CompilationError: where ``mode`` is ``always`` and the potential cannot be compiled.
    """
    potential = Potential.load(path, digest=digest).requires_grad_(False)
    stored = potential.model_file
    if dtype is not None or device is not None:
        potential = potential.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
    return accelerated(
        potential,
        mode=mode,
        digest=None if stored is None else stored.digest,
        batch=batch,
        dtype=torch.float64 if dtype is None else getattr(torch, dtype),
    )
