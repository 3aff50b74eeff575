"""torch-sim: models for its batched integrators and optimisers (``torch-sim-atomistic``, Python 3.12 or newer).

Import it as ``flowbridge.integrations.torch_sim``; inside, ``import torch_sim`` is the package itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from ase import units
from torch import Tensor

from ..core.energy import COMPILED_BATCH
from ..core.errors import ConfigurationError, MissingDependencyError, MoleculeMismatchError
from ..core.evaluator import EvaluationOptions, Evaluator
from ..core.matching import check_particles
from ..core.potential import Particles, Potential

try:
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise MissingDependencyError(
        "models for torch-sim need it: pip install torch-sim-atomistic, with Python 3.12 or newer"
    ) from error

if TYPE_CHECKING:
    from torch_sim.state import SimState

_ENERGY = units.kJ / units.mol  # eV
_LENGTH = units.nm  # Angstrom


class FlowbridgeTorchSimModel(ModelInterface):
    """A potential as a torch-sim model: many copies of its molecule (or box) as one batch.

    Energies ``(S,)`` in eV, forces ``(S N, 3)`` in eV/Angstrom and, for periodic potentials, stress ``(S, 3, 3)`` in
    eV/Angstrom^3, in the dtype of the state, detached. Each system of a state holds the potential's particles in their order; a
    potential of an isolated molecule wants states without periodic boundaries, whose molecules are whole.

    Args:
        potential: a potential, used as it is, or the path of a model file, compiled for this machine where it runs on the CPU.
        device: where to evaluate; None keeps an object where it is and puts a file's model on the CPU.
        dtype: of the states.
        global_parameters: values that differ from the potential's defaults.

    Raises:
        ConfigurationError: for unknown global parameters.
    """

    _memory_scales_with = "n_atoms"

    def __init__(
        self,
        potential: Potential | str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
        global_parameters: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        place = None if device is None else torch.device(device)
        if isinstance(potential, Potential):
            self.evaluator = Evaluator(potential if place is None else potential.to(place))
        else:
            compilation = "auto" if place is None or place.type == "cpu" else "never"
            where = None if place is None else str(place)
            options = EvaluationOptions(COMPILED_BATCH, device=where, compilation=compilation)
            self.evaluator = Evaluator.of(potential, options)
        self.parameters_given = self.evaluator.parameters(global_parameters or {})
        metadata = self.evaluator.metadata
        self._device = place or self.evaluator.device
        self._dtype = dtype
        self._compute_forces = True
        self._compute_stress = metadata.periodic
        self._numbers = torch.tensor(metadata.particles.atomic_numbers, device=self._device)

    def forward(self, state: SimState, **kwargs: Any) -> dict[str, Tensor]:
        """Return ``energy``, ``forces`` and, for a periodic potential, ``stress`` of every system of the state.

        Raises:
            MoleculeMismatchError: when a system's atoms are not the potential's.
            ConfigurationError: when its boundaries are not.
        """
        systems = self._systems(state)
        positions = state.positions.detach().reshape(systems, -1, 3) / _LENGTH
        periodic = self.evaluator.metadata.periodic
        # torch-sim keeps cell vectors in columns.
        cell = state.cell.detach().mT.contiguous() / _LENGTH if periodic else None
        energy, forces = self.evaluator.evaluated.energy_and_forces(positions, cell, **self.parameters_given)
        results = {
            "energy": (energy * _ENERGY).to(self._dtype),
            "forces": (forces * (_ENERGY / _LENGTH)).reshape(-1, 3).to(self._dtype),
        }
        if cell is not None:
            stress = self.evaluator.stresses(positions, cell, self.parameters_given)
            results["stress"] = (stress * (_ENERGY / _LENGTH**3)).to(self._dtype)
        return results

    def _systems(self, state: SimState) -> int:
        """Return the number of systems, after comparing each with the potential's particles."""
        metadata, count = self.evaluator.metadata, len(self._numbers)
        systems = int(state.n_systems)
        sizes = torch.bincount(state.system_idx, minlength=systems)
        if bool((sizes != count).any()):
            raise MoleculeMismatchError(
                f"the systems of the state have {sizes.tolist()[:8]} atoms, the potential {count} particles in each"
            )
        numbers = state.atomic_numbers
        if not torch.equal(numbers.reshape(systems, count), self._numbers.expand(systems, count)):
            given = Particles(("",) * len(numbers), tuple(numbers.tolist()), (0.0,) * len(numbers))
            check_particles(given, metadata.particles, replicas=systems, whole="systems of the state")
        periodic = bool(torch.as_tensor(state.pbc).any())
        if periodic != metadata.periodic or (periodic and not bool(torch.as_tensor(state.pbc).all())):
            wanted = "periodic in all directions" if metadata.periodic else "of an isolated molecule"
            raise ConfigurationError(
                f"the potential is {wanted}, the state has pbc = {torch.as_tensor(state.pbc).tolist()}"
            )
        return systems
