"""openmmtools: moves of a Boltzmann generator in its Markov chains and samplers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import openmm
from openmm import unit

from ..core.errors import MissingDependencyError
from ..flows.boltzmann.generator import BoltzmannGenerator
from .openmm.sampling.boltzmann_moves import BoltzmannMove, MoveStatistics

try:
    from openmmtools import mcmc
except ImportError as error:
    raise MissingDependencyError("moves within openmmtools need it: pip install openmmtools") from error


class BoltzmannMCMCMove(mcmc.MCMCMove):
    """Proposals of a Boltzmann generator as an ``openmmtools.mcmc.MCMCMove``: alone, or in a ``SequenceMove`` with dynamics.

    The acceptance probability and the arguments are those of
    :class:`~flowbridge.integrations.openmm.sampling.boltzmann_moves.BoltzmannMove`. openmmtools' own Metropolis moves
    assume symmetric proposals, which these are not.

    Args:
        model: path of the model file, loaded at the first application; the move is stored with the path.
        particles: indices of the molecule, in the model's order; all particles where None.
        proposals: number of proposals of one application.
        scale: 1 for independent proposals, less for steps in latent space.
        anchors: indices within the molecule of the atoms to superpose, all where None.
        seed: random seed.

    Attributes:
        statistics: counts of all proposals so far.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        particles: Sequence[int] | None = None,
        proposals: int = 1,
        scale: float = 1.0,
        anchors: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = os.fspath(model)
        self.particles = None if particles is None else [int(index) for index in particles]
        self.anchors = None if anchors is None else [int(index) for index in anchors]
        self.proposals, self.scale, self.seed = proposals, scale, seed
        self.statistics = MoveStatistics()
        self._generator: BoltzmannGenerator | None = None
        self._state: dict[str, Any] | None = None

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Make the proposals in a thermodynamic state and update ``sampler_state``.

        Raises as :class:`~flowbridge.integrations.openmm.sampling.boltzmann_moves.BoltzmannMove` does.
        """
        contexts = self._get_context_cache(context_cache)
        integrator = openmm.VerletIntegrator(1.0 * unit.femtosecond)
        context, _ = contexts.get_context(thermodynamic_state, integrator)
        sampler_state.apply_to_context(context)
        if self._generator is None:
            self._generator = BoltzmannGenerator.load(self.model)
        move = BoltzmannMove(
            context,
            self._generator,
            particles=self.particles,
            temperature=thermodynamic_state.temperature.value_in_unit(unit.kelvin),
            scale=self.scale,
            anchors=self.anchors,
            seed=self.seed,
        )
        if self._state is not None:
            move.load_state_dict(self._state)
        move.attempt(self.proposals)
        self._state, self.statistics = move.state_dict(), move.statistics
        sampler_state.update_from_context(context)

    def __getstate__(self) -> dict[str, Any]:
        """Return what openmmtools stores: arguments, counts and the state of the random numbers, but no networks."""
        return {name: value for name, value in self.__dict__.items() if name != "_generator"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a result of :meth:`__getstate__`; the model is loaded at the next application."""
        self.__dict__.update(state, _generator=None)
