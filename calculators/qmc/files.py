"""Files of quantum Monte Carlo: wave functions, samples of electrons, densities. Tensors in safetensors, the rest in JSON.

Nothing is unpickled. A digest of the whole file reveals every altered bit. The file of samples is also the exchange format
for other programs (``integrations/deepqmc/export.py`` writes it).

Layout: the safetensors metadata hold one entry, ``flowbridge``: a JSON object with ``digest`` (SHA-256 of the file with the
digest's 64 characters replaced by zeros; may be absent in files of other programs), ``format`` (``"flowbridge-qmc"``),
``version`` (1), ``kind`` (``"samples"``, ``"wave_function"``, ``"density"``, ``"sampler"``) and the content of the kind.
Samples: ``molecule`` with ``numbers``, ``positions`` in bohr, ``charge`` and ``spin``, and float64 tensors ``positions``,
    ``scores``
``(S, W, N, 3)``, ``kinetic``, ``potential`` ``(S, W)``, in atomic units, electrons with spin up first: S configurations of each
of W independent walkers that sample |Psi|^2, gradients of ``ln |Psi|^2`` by each electron, and the parts of the local energy.
Optional: the number ``acceptance`` of the moves, and the tensor ``log_absolute`` ``(S, W)`` of ln|Psi|.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core.atomic_files import write_whole
from ...core.errors import ModelFileError

FORMAT, VERSION = "flowbridge-qmc", 1

_BLANK = "0" * 64
_REMEDY = "Give a file that flowbridge wrote, or compute it again"


def write_file(
    path: str | os.PathLike[str], kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """Write a file, whole or not at all, and return its digest.

    Raises:
        ModelFileError: when it cannot be written, or a tensor holds NaN or infinity.
    """
    target = Path(path).absolute()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{target}: the tensor {name} holds NaN or infinite numbers and is not stored")
    document = json.dumps(
        {"digest": _BLANK, "format": FORMAT, "version": VERSION, "kind": kind, **content}, allow_nan=False
    )
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    blob: bytes = safetensors.torch.save(copies, {"flowbridge": document})
    digest = hashlib.sha256(blob).hexdigest()
    place = blob.index(_BLANK.encode())
    blob = blob[:place] + digest.encode() + blob[place + len(_BLANK) :]
    write_whole(target, blob)
    return digest


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return content and tensors of a file of one kind.

    Raises:
        ModelFileError: when the file is missing, damaged, altered, foreign, too new, or of another kind.
    """
    target = Path(path).absolute()
    try:
        blob = target.read_bytes()
        with safe_open(str(target), framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load(blob)
    except FileNotFoundError as error:
        raise ModelFileError(f"{target}: there is no such file. Check the path") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{target}: is truncated, or no safetensors file ({error}). {_REMEDY}") from error
    try:
        content = json.loads(metadata["flowbridge"])
        found, version, held = content["format"], content["version"], content["kind"]
    except (KeyError, ValueError, TypeError) as error:
        raise ModelFileError(f"{target}: holds no quantum Monte Carlo data of flowbridge. {_REMEDY}") from error
    if found != FORMAT or version != VERSION:
        raise ModelFileError(f"{target}: is {found} version {version}; expected {FORMAT} version {VERSION}. {_REMEDY}")
    digest = content.get("digest")
    if digest is not None:
        place = blob.find(str(digest).encode())
        blank = blob[:place] + _BLANK.encode() + blob[place + 64 :]
        if len(str(digest)) != 64 or hashlib.sha256(blank).hexdigest() != digest:
            raise ModelFileError(f"{target}: was altered after it was written: its digest does not fit. {_REMEDY}")
    if held != kind:
        raise ModelFileError(f"{target}: holds a {held}, and a {kind} is needed")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{target}: the tensor {name} holds NaN or infinite numbers. {_REMEDY}")
    return content, tensors
