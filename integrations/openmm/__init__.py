"""OpenMM: potentials as forces, Systems as potentials, batched energies, trajectories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annealing import OpenMMLangevinKernel, annealed_samples
    from .boltzmann_moves import BoltzmannMove, BoltzmannMover
    from .energies import OpenMMEnergy
    from .forces import add_potential, particle_system
    from .spread_energies import SpreadEnergy
    from .system_potential import SystemPotential

__all__ = [
    "BoltzmannMove",
    "BoltzmannMover",
    "OpenMMEnergy",
    "OpenMMLangevinKernel",
    "SpreadEnergy",
    "SystemPotential",
    "add_potential",
    "annealed_samples",
    "particle_system",
]

_PLACES = {
    "BoltzmannMove": ".boltzmann_moves",
    "BoltzmannMover": ".boltzmann_moves",
    "OpenMMEnergy": ".energies",
    "SpreadEnergy": ".spread_energies",
    "OpenMMLangevinKernel": ".annealing",
    "SystemPotential": ".system_potential",
    "add_potential": ".forces",
    "annealed_samples": ".annealing",
    "particle_system": ".forces",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: processes that only simulate import this package too, and need no torch.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
