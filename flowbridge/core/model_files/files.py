"""Model files: save a trained model, and load exactly what was saved or nothing.

See :mod:`flowbridge.core.model_files.format` for the bytes. Nothing is ever unpickled, and no code named by a file
is imported: a kind is looked up among the classes that installed packages registered.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import write_whole
from ..errors import ModelFileError
from ..model import Model, ModelFile
from .format import FORMAT_VERSION, NO_METADATA, UNITS, ModelHeader, decode_header, decode_tensors, encode
from .kinds import KIND_GROUP, find_kind, implementation_name, register_kind
from .privacy_statements import statement_holds

__all__ = [
    "ModelFile",
    "ModelHeader",
    "from_bytes",
    "load",
    "matches_its_file",
    "opened",
    "read_header",
    "register_kind",
    "save",
    "to_bytes",
]

_NO_FILE = Path("a model in memory")  # in messages


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    created: datetime | None = None,
) -> str:
    """Write a model to a model file and return its digest (64 hexadecimal characters).

    The file appears whole or not at all: it is written next to ``path``, flushed to disk and then renamed.
    Before that a model is built from its bytes once, so that what cannot be loaded is not saved.
    Afterwards ``model.model_file`` refers to the file.

    Args:
        model: an instance of a registered kind, on any device.
        path: where to write; an existing file is replaced.
        provenance: JSON-ready statement about the training, kept in the header. The ledger of private training
            (``model.privacy``) is added under ``privacy``.
        created: time to record, timezone-aware; the present by default. The same model saved with the
            same ``created`` by the same package versions gives the same bytes.

    Raises:
        ModelFileError: when the model cannot be stored faithfully or the file cannot be written.
        ValueError: when ``created`` has no timezone.
    """
    target = Path(path).absolute()
    moment = created or datetime.now(UTC)
    if moment.tzinfo is None:
        raise ValueError(f"created must be timezone-aware, got {created!r}: pass datetime(..., tzinfo=UTC)")
    blob = _encoded(model, target, dict(provenance or {}), moment)
    header = decode_header(blob, target)
    _build(header, blob, target)
    write_whole(target, blob)
    model.model_file = ModelFile(target, header.digest)
    return header.digest


def load(path: str | os.PathLike[str], *, digest: str | None = None) -> Model:
    """Read a model file and return its model on the CPU, in evaluation mode.

    ``model.model_file`` holds the path and digest it came from. The global random state is left alone.

    Args:
        path: a file written by :func:`save`.
        digest: when given, only the file with exactly this digest is accepted.

    Raises:
        ModelFileError: when the file is missing, truncated, altered, foreign, written in a newer format, of
            an unknown kind, inconsistent with its configuration, or not the one with ``digest``.
    """
    _, build = opened(path, digest=digest)
    return build()


def opened(path: str | os.PathLike[str], *, digest: str | None = None) -> tuple[ModelFile, Callable[[], Model]]:
    """Read and verify a model file, once; return its absolute path with its digest, and what builds its model.

    Arguments and errors as for :func:`load`.
    """
    target = Path(path).absolute()
    blob = _read(target)
    header = decode_header(blob, target)
    if digest is not None and digest != header.digest:
        raise ModelFileError(
            f"{target}: not the model that is referred to: its digest is {header.digest}, expected {digest}. "
            "Put the original file back, or set the simulation up again with this one"
        )
    file = ModelFile(target, header.digest)

    def build() -> Model:
        model = _build(header, blob, target)
        model.model_file = file
        return model

    return file, build


def to_bytes(model: Model) -> bytes:
    """Return what :func:`save` would write, for a journey to another process; raises ModelFileError as it does.

    The same model gives the same bytes.
    """
    return _encoded(model, _NO_FILE, {}, datetime.fromtimestamp(0, UTC))


def from_bytes(blob: bytes) -> Model:
    """Return the model of :func:`to_bytes`, which belongs to no file; raises ModelFileError as :func:`load` does."""
    return _build(decode_header(blob, _NO_FILE), blob, _NO_FILE)


def read_header(path: str | os.PathLike[str]) -> ModelHeader:
    """Return the header of a model file after verifying the digest of the whole file; builds no model.

    Raises:
        ModelFileError: as :func:`load`, except that the kind may be unknown here and that the tensors are
            not compared with the configuration.
    """
    target = Path(path).absolute()
    return decode_header(_read(target), target)


def matches_its_file(model: Model) -> bool:
    """Return whether a model still equals the file ``model.model_file`` refers to, bit for bit.

    False when it refers to no file, when its tensors changed since (further training, another dtype), or
    when the file is gone or was replaced. An engine adapter asks this before it stores a reference to the
    file instead of the model.
    """
    if model.model_file is None:
        return False
    path, digest = model.model_file
    try:
        blob = _read(path)
        unchanged = decode_header(blob, path).digest == digest
        stored = decode_tensors(blob, path)
        present = _tensors_of(model, path)
    except ModelFileError:
        return False
    return (
        unchanged
        and stored.keys() == present.keys()
        and all(_same_bits(stored[name], tensor) for name, tensor in present.items())
    )


def _encoded(model: Model, path: Path, provenance: dict[str, Any], created: datetime) -> bytes:
    tensors = _tensors_of(model, path)
    content = _content(model, path, provenance, created)
    try:
        return encode(content, tensors)
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: configuration, metadata or provenance cannot be written as JSON ({error}). Use only "
            "dict, list, str, int, finite float, bool and None"
        ) from error


def _tensors_of(model: Model, path: Path) -> dict[str, Tensor]:
    """Return contiguous CPU copies of the state, refusing what cannot or should not be stored."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelFileError(
                f"{path}: {name} of the state is a {type(value).__name__}, and only tensors can be stored. "
                "Put it into configuration()"
            )
        # A copy, because safetensors refuses names that share memory (tied weights).
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    _require_finite(tensors, path)
    return tensors


def _content(model: Model, path: Path, provenance: dict[str, Any], created: datetime) -> dict[str, Any]:
    """Return the fields of the header except the digest."""
    cls = type(model)
    provenance = _with_privacy(model, path, provenance)
    if not cls.kind or find_kind(cls.kind, path) is not cls:
        raise ModelFileError(
            f"{path}: {implementation_name(cls)} is not registered under its kind {cls.kind!r}. Give it a "
            "unique `kind` and decorate it with flowbridge.core.model_files.files.register_kind, or register it in "
            f"the entry point group {KIND_GROUP}"
        )
    configuration = model.configuration()
    _require_string_keys(configuration, "configuration", path)
    _require_string_keys(provenance, "provenance", path)
    return {
        "format_version": FORMAT_VERSION,
        "kind": cls.kind,
        "implementation": implementation_name(cls),
        "configuration": configuration,
        **NO_METADATA,
        **model.header_metadata(),
        "units": UNITS,
        "versions": _versions(cls),
        "created": created.astimezone(UTC).isoformat(),
        "provenance": provenance,
    }


def _with_privacy(model: Model, path: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance with the model's ledger of private training, which nothing else may stand for."""
    if "privacy" in provenance and provenance["privacy"] != model.privacy:
        raise ModelFileError(
            f"{path}: provenance['privacy'] is not what this model was trained with. Leave it out: the ledger of private "
            "training is added by itself"
        )
    if model.privacy is None:
        return provenance
    if not statement_holds(model, model.privacy):
        raise ModelFileError(
            f"{path}: the tensors were changed after the private training that the ledger is about, and what changed them "
            "is not on it. Save the model as it came out of train_privately(), or, if the change used no data, write its "
            "ledger again with PrivacyLedger.attach(model)"
        )
    return {**provenance, "privacy": model.privacy}


def _require_string_keys(value: Any, label: str, path: Path) -> None:
    # JSON would turn the key 1 into "1" without a word.
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ModelFileError(
                    f"{path}: {label} has the key {key!r}, but JSON keys are strings. Use a list of pairs"
                )
            _require_string_keys(entry, f"{label}[{key!r}]", path)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _require_string_keys(entry, f"{label}[{index}]", path)


def _versions(cls: type[Model]) -> dict[str, str]:
    """Return versions of Python, flowbridge, torch, safetensors and of the package that holds the class."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    providers = packages_distributions().get(cls.__module__.partition(".")[0], [])
    for name in {"flowbridge", "safetensors", *providers}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return dict(sorted(found.items()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: there is no such model file. Check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ModelFileError(f"{path}: cannot be read ({error})") from error


def _build(header: ModelHeader, blob: bytes, path: Path) -> Model:
    """Return the model of verified bytes."""
    cls = find_kind(header.kind, path)
    if cls is None:
        package = header.implementation.partition(":")[0].partition(".")[0]
        raise ModelFileError(
            f"{path}: holds a model of the kind {header.kind!r}, which no installed package provides. It "
            f"was written by {header.implementation}: install the package {package!r}, or import the script "
            "that defines the class and call flowbridge.core.model_files.files.register_kind on it"
        )
    tensors = decode_tensors(blob, path)
    _require_finite(tensors, path)
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, only to be replaced
            model = cls.from_configuration(header.configuration)
    except Exception as error:
        raise ModelFileError(
            f"{path}: {implementation_name(cls)} cannot be built from the stored configuration "
            f"({type(error).__name__}: {error}). The file was written with {header.versions}"
        ) from error
    model.eval()  # now: what modules do on leaving training must not touch the stored numbers
    _fill(model, tensors, path)
    model.privacy = header.provenance.get("privacy")
    return model


def _fill(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a model, changing its floating dtypes to the stored ones and nothing else."""
    state = model.state_dict(keep_vars=True)
    reasons = [f"{name} is missing from the file" for name in state.keys() - tensors.keys()]
    reasons += [f"{name} has no place in the model" for name in tensors.keys() - state.keys()]
    for name in state.keys() & tensors.keys():
        expected, given = state[name], tensors[name]
        floating = expected.is_floating_point() and given.is_floating_point()
        if expected.shape != given.shape or not (floating or expected.dtype == given.dtype):
            reasons.append(
                f"{name} is {given.dtype} {tuple(given.shape)}, the model has {expected.dtype} {tuple(expected.shape)}"
            )
    if reasons:
        more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        raise ModelFileError(
            f"{path}: the stored tensors do not fit the model that {implementation_name(type(model))} "
            f"builds from the stored configuration: {'; '.join(sorted(reasons)[:5])}{more}. Use the package "
            "version that wrote the file"
        )
    for name, given in tensors.items():
        if state[name].dtype != given.dtype:
            # On the tensor itself, so that tied parameters stay tied.
            state[name].data = state[name].data.to(given.dtype)
    model.load_state_dict(tensors)


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            raise ModelFileError(
                f"{path}: the tensor {name} has {count} entries that are NaN or infinite, and such a model "
                "gives no usable energies. Go back to a state from before the training diverged"
            )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )
