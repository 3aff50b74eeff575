"""What a compiled program depends on, as plain data: the model, the code that evaluates it, and the machine."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..execution.machine import machine
from ..potential import Potential

_LAYOUT = 1  # raise it when programs are made in another way from the same inputs


def describe(potential: Potential, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return all that the compiled program of a potential depends on, besides the numbers in it.

    Args:
        potential: the potential, in its dtype and on its device.
        batch: number of configurations of one call.
        dtype: of positions.
        device: of positions and parameters.
    """
    return {
        "layout": _LAYOUT,
        "class": f"{type(potential).__module__}.{type(potential).__qualname__}",
        "source": source_digest(potential),
        "batch": batch,
        "positions": str(dtype),
        "parameters": sorted({str(tensor.dtype) for tensor in (*potential.parameters(), *potential.buffers())}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "machine": machine(),
    }


def source_digest(potential: Potential) -> str:
    """Return a digest of the Python files that define the potential's classes, and of their neighbours.

    An edited flow must not run the program of the old one. For a module of a package the whole subpackage counts (all of
    ``flowbridge.flows`` for a flow), because classes use functions of modules beside theirs; torch is covered by its version.
    """
    modules = {cls.__module__ for part in potential.modules() for cls in type(part).__mro__}
    files: set[Path] = set()
    versions = []
    for name in modules | {Potential.__module__}:
        top = name.partition(".")[0]
        if top in ("torch", "builtins", "typing", "abc"):
            continue
        package = sys.modules.get(".".join(name.split(".")[:2]))
        source = getattr(package, "__file__", None) or getattr(sys.modules.get(name), "__file__", None)
        if source is None:
            continue  # typed into an interpreter: the digest of the program tells such classes apart
        path = Path(source)
        files |= set(path.parent.rglob("*.py")) if path.name == "__init__.py" else {path}
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{top} {version(top)}")
    digest = hashlib.sha256(repr(sorted(set(versions))).encode())
    for content in sorted(path.read_bytes() for path in files):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def program_digest(program: ExportedProgram) -> str:
    """Return a digest of the operations and of all constants of a traced program."""
    digest = hashlib.sha256(str(program.graph).encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
