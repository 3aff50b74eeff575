"""OpenMM: potentials as forces, batched energies, trajectories."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forces import add_potential, particle_system

__all__ = ["add_potential", "particle_system"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: processes that only simulate import this package too, and need no torch.
    if name in __all__:
        from . import forces

        return getattr(forces, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
