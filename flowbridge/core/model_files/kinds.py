"""The kinds of models that model files may hold: a name in the file, a class in an installed package."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from ..errors import ModelFileError
from ..model import Model

KIND_GROUP = "flowbridge.model_kinds"
"""Entry point group in which packages register their classes under their kinds."""

_registered: dict[str, type[Model]] = {}


def register_kind(cls: type[Model]) -> type[Model]:
    """Make a class known to model files in this process; usable as a decorator.

    For classes of scripts and notebooks. A package registers its classes in the entry point group
    ``flowbridge.model_kinds`` instead, so that files load without the package being imported first.

    Raises:
        ValueError: when the class has no ``kind``, or another class holds that name.
    """
    if not cls.kind:
        raise ValueError(f"{cls.__qualname__} has no kind: set the class attribute `kind` to a unique name")
    holder = _registered.get(cls.kind)
    if holder is not None and implementation_name(holder) != implementation_name(cls):
        raise ValueError(
            f"the kind {cls.kind!r} of {implementation_name(cls)} is taken by {implementation_name(holder)}: "
            "choose another name"
        )
    _registered[cls.kind] = cls  # perhaps the same class defined again by a notebook cell
    return cls


def find_kind(kind: str, path: Path) -> type[Model] | None:
    """Return the class registered under a kind, or None.

    Raises:
        ModelFileError: naming ``path``, when the class's package is installed but cannot be imported.
    """
    if kind in _registered:
        return _registered[kind]
    for entry in entry_points(group=KIND_GROUP, name=kind):
        try:
            cls = entry.load()
        except Exception as error:
            raise ModelFileError(
                f"{path}: the kind {kind!r} is provided by {entry.value}, which cannot be imported "
                f"({type(error).__name__}: {error}). Repair that installation"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Model)):
            raise ModelFileError(
                f"{path}: the kind {kind!r} is registered as {entry.value}, which is no Model class. "
                "Repair the entry point of that package"
            )
        return cls
    return None


def implementation_name(cls: type[Model]) -> str:
    """Return ``module:class``, for headers and messages."""
    return f"{cls.__module__}:{cls.__qualname__}"
