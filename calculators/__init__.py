"""ASE calculators."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .. import core  # noqa: F401 (imported by itself, as ``calculators``, this folder fails here: its modules have one name)

if TYPE_CHECKING:
    from .potential_calculator import PotentialCalculator
    from .qmc.calculator import QMCCalculator

__all__ = ["PotentialCalculator", "QMCCalculator"]

_HOMES = {"PotentialCalculator": ".potential_calculator", "QMCCalculator": ".qmc.calculator"}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing one calculator does not need what the others need.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
