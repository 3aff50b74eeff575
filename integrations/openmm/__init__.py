"""OpenMM: potentials as forces, Systems as potentials, batched energies, trajectories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .energies.batched import OpenMMEnergy
    from .energies.distributed import DistributedEnergy
    from .energies.system_potential import SystemPotential
    from .forces.add_potential import add_potential, particle_system
    from .sampling.annealing import OpenMMLangevinKernel, annealed_samples
    from .sampling.boltzmann_moves import BoltzmannMove, BoltzmannMover

__all__ = [
    "BoltzmannMove",
    "BoltzmannMover",
    "DistributedEnergy",
    "OpenMMEnergy",
    "OpenMMLangevinKernel",
    "SystemPotential",
    "add_potential",
    "annealed_samples",
    "particle_system",
]

_PLACES = {
    "BoltzmannMove": ".sampling.boltzmann_moves",
    "BoltzmannMover": ".sampling.boltzmann_moves",
    "OpenMMEnergy": ".energies.batched",
    "DistributedEnergy": ".energies.distributed",
    "OpenMMLangevinKernel": ".sampling.annealing",
    "SystemPotential": ".energies.system_potential",
    "add_potential": ".forces.add_potential",
    "annealed_samples": ".sampling.annealing",
    "particle_system": ".forces.add_potential",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: processes that only simulate import this package too, and need no torch.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
