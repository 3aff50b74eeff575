"""ASE calculators."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .potentials import PotentialCalculator

__all__ = ["PotentialCalculator"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that importing one calculator does not need what the others need.
    if name in __all__:
        from . import potentials

        return getattr(potentials, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
