"""The contract of everything that was trained and is kept in a model file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch

from .errors import ConfigurationError


class ModelFile(NamedTuple):
    """The file that a model was loaded from or saved to: absolute path and digest."""

    path: Path
    digest: str


class Model(torch.nn.Module):
    """A trained module with a kind and a configuration, which a model file can hold.

    A subclass sets ``kind`` and ``description``, writes :meth:`configuration` and :meth:`from_configuration`, and is
    registered under its kind (see :mod:`flowbridge.core.model_files`). What has an energy of positions is a
    :class:`~flowbridge.core.potential.Potential`; what can be drawn from is a :class:`~flowbridge.core.generator.Generator`.
    """

    kind: ClassVar[str] = ""
    """Name under which model files know this class; registered in the group ``flowbridge.model_kinds``."""

    description: ClassVar[str] = "a model"
    """What the class is, with its article, for messages."""

    model_file: ModelFile | None = None
    """Where this model was last loaded from or saved to."""

    privacy: dict[str, Any] | None = None
    """The ledger of private training (see :mod:`flowbridge.forcefields.private.ledger`), which model files keep."""

    def configuration(self) -> dict[str, Any]:
        """Return all that :meth:`from_configuration` needs besides the tensors, ready for JSON."""
        raise TypeError(f"{type(self).__name__} cannot be saved: it has no configuration()")

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """Build an untrained instance whose ``state_dict`` has the shapes of the saved one."""
        raise TypeError(f"{cls.__name__} cannot be loaded: it has no from_configuration()")

    def header_metadata(self) -> dict[str, Any]:
        """Return the fields of the file's header that a reader wants to know without building the model, ready for JSON.

        Names are those of :class:`~flowbridge.core.model_files.format.ModelHeader` (``particles``, ``temperature``,
        ``periodic``, ``global_parameters``); what is left out has no meaning for this model.
        """
        return {}

    def save(self, path: str | os.PathLike[str], **options: Any) -> str:
        """Write this model to a file and return its digest; see :func:`flowbridge.core.model_files.save`."""
        from .model_files.files import save  # it needs this class

        return save(self, path, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, digest: str | None = None) -> Self:
        """Read a model file that holds an instance of this class; see :func:`flowbridge.core.model_files.load`.

        Raises:
            ModelFileError: when the file cannot be read.
            ConfigurationError: when it holds another kind of model; the message says which.
        """
        from .model_files.files import load  # it needs this class

        return cls.expected_in(path, load(path, digest=digest))

    @classmethod
    def expected_in(cls, path: str | os.PathLike[str], model: Model) -> Self:
        """Return the model of a file if it is an instance of this class; raises ConfigurationError otherwise."""
        if not isinstance(model, cls):
            raise ConfigurationError(f"{path}: holds {what_is(model)}, not {cls.description}. Give another file")
        return model

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return a model that is given as an object of this class or as the path of its model file.

        Raises:
            ModelFileError: when the file cannot be read.
            ConfigurationError: for anything else, another kind of model for instance; the message says what was given.
        """
        if isinstance(model, cls):
            return model
        if isinstance(model, str | os.PathLike):
            return cls.load(model)
        raise ConfigurationError(f"expected {cls.description} or the path of its model file, got {what_is(model)}")


def what_is(model: object) -> str:
    """Return what a model or any other object is, for messages."""
    name = type(model).__name__
    return f"{model.description} ({name})" if isinstance(model, Model) else f"a {name}"
