"""The bytes of a model file: tensors and a JSON header in safetensors, sealed by a digest.

Any safetensors reader opens the file. Everything besides the tensors is JSON under the key ``flowbridge``
of the safetensors metadata. That JSON begins with the digest: SHA-256 over the whole file with the digest's
own 64 characters replaced by zeros, so that no bit of the file can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ModelFileError
from ..potential import Particles

FORMAT_VERSION = 1
UNITS = {
    "length": "nm",
    "energy": "kJ/mol",
    "time": "ps",
    "mass": "amu",
    "temperature": "K",
    "charge": "e",
    "angle": "rad",
}

NO_METADATA = {
    "particles": Particles((), (), ()).to_dict(),
    "temperature": None,
    "periodic": False,
    "global_parameters": {},
}
"""What the header of a model says that is no potential, in the fields that only potentials need."""

_METADATA_KEY = "flowbridge"
_BLANK_DIGEST = "0" * 64
# What precedes the digest in the file. The JSON is itself a string of the safetensors header, hence \".
_DIGEST_MARKER = rf'"{_METADATA_KEY}":"{{\"digest\":\"'.encode()
_LENGTH_BYTES = 8
_REMEDY = "Give a file written by flowbridge.save, or restore this one from a copy"


class TensorEntry(NamedTuple):
    """A stored tensor: safetensors dtype name (``F32``, ``I64``, ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


class ModelHeader(BaseModel):
    """What a model file says about the model it holds.

    Attributes:
        format_version: version of the file format.
        kind: name under which the class of the model is registered.
        implementation: ``module:class`` that wrote the file; for messages, never imported.
        configuration: what the class's ``from_configuration`` takes.
        particles: the particles of a potential; none for a model without.
        temperature: K at which it was trained, or None.
        periodic: whether it needs a cell.
        global_parameters: names and defaults of its global parameters.
        units: units of everything in the file.
        versions: versions of Python and of the packages that wrote the file.
        created: when it was written, UTC.
        provenance: free-form statement about the training.
        digest: SHA-256 of the file, 64 hexadecimal characters.
        tensors: name to dtype and shape of every tensor; read off the file, not part of the JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    kind: str
    implementation: str
    configuration: dict[str, Any]
    particles: Particles
    temperature: float | None
    periodic: bool
    global_parameters: dict[str, float]
    units: dict[str, str]
    versions: dict[str, str]
    created: datetime
    provenance: dict[str, Any]
    digest: str
    tensors: dict[str, TensorEntry] = Field(default_factory=dict, exclude=True)


def encode(content: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a model file with ``content`` (the header's fields but the digest) and tensors.

    Raises:
        TypeError, ValueError, RecursionError: when ``content`` is not JSON or holds a NaN or infinity.
    """
    document = json.dumps({"digest": _BLANK_DIGEST, **content}, allow_nan=False, separators=(",", ":"))
    blob: bytes = safetensors.torch.save(tensors, {_METADATA_KEY: document})
    position = blob.index(_DIGEST_MARKER) + len(_DIGEST_MARKER)
    digest = hashlib.sha256(blob).hexdigest().encode()
    return b"".join([blob[:position], digest, blob[position + len(digest) :]])


def decode_header(blob: bytes, path: Path) -> ModelHeader:
    """Return the header of a file all of whose bits agree with its digest.

    Raises:
        ModelFileError: naming ``path`` and the reason, for everything else.
    """
    text, tensors = _split(blob, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: its flowbridge header is damaged ({error}). {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: its flowbridge header is damaged (no JSON object). {_REMEDY}")
    _verify(blob, content, path)
    try:
        header = ModelHeader.model_validate({**content, "tensors": tensors})
    except (ValidationError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: its header is not one that flowbridge writes: {error}") from error
    if header.format_version < 1 or header.units != UNITS:
        raise ModelFileError(
            f"{path}: format version {header.format_version} with units {header.units} cannot be read here; "
            f"expected version 1 to {FORMAT_VERSION} with {UNITS}. {_REMEDY}"
        )
    return header


def decode_tensors(blob: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file whose header :func:`decode_header` accepted; raises ModelFileError."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: its tensors cannot be read ({error}). {_REMEDY}") from error
    return tensors


def _verify(blob: bytes, content: dict[str, Any], path: Path) -> None:
    """Raise ModelFileError unless the digest holds and the format version is one that is known here."""
    marker = blob.find(_DIGEST_MARKER, _LENGTH_BYTES)
    start = marker + len(_DIGEST_MARKER)
    end = start + len(_BLANK_DIGEST)
    hasher = hashlib.sha256(blob[:start])
    hasher.update(_BLANK_DIGEST.encode())
    hasher.update(blob[end:])
    expected = hasher.hexdigest()
    intact = marker >= 0 and blob[start:end] == expected.encode() and content.get("digest") == expected
    # A file without the digest in its place is either foreign or of a format that moved it.
    found = content.get("format_version")
    if type(found) is int and found > FORMAT_VERSION and (intact or marker < 0):
        raise ModelFileError(
            f"{path}: written in format version {found}, and this flowbridge reads up to {FORMAT_VERSION}. "
            "Upgrade flowbridge (pip install --upgrade flowbridge)"
        )
    if not intact:
        raise ModelFileError(
            f"{path}: its content does not agree with its digest: it was damaged, edited, or rewritten by "
            "another program. Restore it from a copy, or save the model again with flowbridge.save"
        )


def _split(blob: bytes, path: Path) -> tuple[str, dict[str, TensorEntry]]:
    """Return our JSON text and the tensor entries of the safetensors header, after checking all lengths."""
    if not blob:
        raise ModelFileError(f"{path}: the file is empty. {_REMEDY}")
    if blob[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise ModelFileError(f"{path}: not a flowbridge model file (not even safetensors). {_REMEDY}")
    start = _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "little")
    if start > len(blob):
        raise ModelFileError(
            f"{path}: truncated or damaged: its header should end at byte {start}, the file ends at "
            f"{len(blob)}. {_REMEDY}"
        )
    try:
        header = json.loads(blob[_LENGTH_BYTES:start])
        text = header.pop("__metadata__", {}).get(_METADATA_KEY)
        end = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {
            name: TensorEntry(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a flowbridge model file, or its header is damaged. {_REMEDY}") from error
    if not isinstance(text, str):
        raise ModelFileError(f"{path}: a safetensors file without a flowbridge header. {_REMEDY}")
    if end != len(blob):
        state = "truncated" if len(blob) < end else "longer than it should be"
        raise ModelFileError(f"{path}: {state}: {len(blob)} bytes instead of {end}. {_REMEDY}")
    return text, tensors
