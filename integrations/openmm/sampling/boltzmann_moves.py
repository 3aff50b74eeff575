"""Monte Carlo moves within a simulation: conformations of a Boltzmann generator, accepted by Metropolis-Hastings."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit

from ....core.errors import ConfigurationError, NonFiniteEnergyError
from ....core.units import thermal_energy
from ....flows.boltzmann.generator import BoltzmannGenerator
from ....flows.boltzmann.latent_proposals import LatentProposals
from ..forces.matching import matching_particles
from .dynamics import copy_vectors

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_SAME_TEMPERATURE = 1e-3  # K


@dataclass
class MoveStatistics:
    """Counts of proposals.

    Attributes:
        proposed: number of proposals.
        accepted: number of accepted proposals.
        not_finite: number of proposals rejected because their energy was not finite.
    """

    proposed: int = 0
    accepted: int = 0
    not_finite: int = 0

    @property
    def acceptance(self) -> float:
        """Fraction of proposals that were accepted; NaN before the first."""
        return self.accepted / self.proposed if self.proposed else math.nan


class BoltzmannMove:
    """Replaces the conformation of one molecule in a Context by proposals of a Boltzmann generator.

    A proposal is accepted with probability ``min(1, exp(-(U' - U)/kT) q(x) / q(x'))``, U the energy of the whole Context and q
    the flow's density of the molecule's conformation: the distribution that the Context samples at temperature T (and, with a
    barostat, at its pressure) is unchanged. The proposed conformation is superposed on the present one; this motion is
    reversible, so positions and orientations contribute no factor. After an accepted move all velocities are redrawn.

    Args:
        context: Context with positions, and forces that hold the molecule together; the flow adds no energy.
        model: a Boltzmann generator, or the path of its file.
        topology: topology whose elements are compared with the model's; masses are compared where None.
        particles: indices of the molecule, in the model's order; all particles where None.
        temperature: temperature, K; that of the Context's integrator where None.
        scale: 1 for proposals independent of the present conformation, less for steps in latent space; see
            :class:`~flowbridge.flows.boltzmann.latent_proposals.LatentProposals`.
        anchors: indices within the molecule of the atoms to superpose, all (by mass) where None.
        seed: random seed.
        compilation: :data:`~flowbridge.core.compilation.programs.CompilationMode` of the sampling; ``"cached"`` compiles
            nothing.

    Attributes:
        statistics: counts of all proposals so far.

    Raises:
        MoleculeMismatchError: when the particles are not the model's.
        ConfigurationError: for constraints, virtual sites or fixed particles in the molecule, an unknown or contradictory
            temperature, or another unusable argument.

    Warns:
        UserWarning: when the model was trained for another temperature: moves stay exact, with fewer acceptances.
    """

    def __init__(
        self,
        context: openmm.Context,
        model: BoltzmannGenerator | str | os.PathLike[str],
        *,
        topology: app.Topology | None = None,
        particles: Sequence[int] | None = None,
        temperature: float | None = None,
        scale: float = 1.0,
        anchors: Sequence[int] | None = None,
        seed: int = 0,
        compilation: str = "cached",
    ) -> None:
        self.model = BoltzmannGenerator.of(model).requires_grad_(False)
        system = context.getSystem()
        self.particles = np.array(_molecule(system, self.model, topology, particles))
        self.context = context
        self.temperature = _temperature(context.getIntegrator(), temperature, self.model)
        self.statistics = MoveStatistics()
        self._proposals = LatentProposals(self.model, scale, torch.Generator().manual_seed(seed), compilation)
        self._weights = _anchor_weights(self.model, anchors)
        self._bonds = np.array(self.model.metadata.particles.bonds, dtype=int).reshape(-1, 2)
        self._positions = np.empty((system.getNumParticles(), 3))

    def attempt(self, proposals: int = 1) -> int:
        """Make ``proposals`` proposals one after the other; return how many were accepted.

        Raises:
            NonFiniteEnergyError: when the present energy is not finite; nothing is changed.
            ConfigurationError: when the molecule is broken across the periodic box.
        """
        state = self.context.getState(positions=True, energy=True)
        energy = _energy(state)
        if not math.isfinite(energy):
            raise NonFiniteEnergyError(
                f"the energy before a move is {energy} kJ/mol: minimise, or take a smaller time step"
            )
        copy_vectors(state, self._positions)
        present = self._positions[self.particles]
        self._refuse_broken(present, state)
        log_prob = self._proposals.start(torch.as_tensor(present)).log_prob
        accepted = 0
        for _ in range(proposals):
            proposal = self._proposals()
            placed = superposed(proposal.positions.numpy(), present, self._weights)
            found = self._energy_with(placed, present)
            log_ratio = -(found - energy) / thermal_energy(self.temperature) + log_prob - proposal.log_prob
            if self._decide(log_ratio):
                present, energy, log_prob = placed, found, proposal.log_prob
                self._proposals.accept(proposal, torch.as_tensor(placed))
                accepted += 1
        self._set(present)
        if accepted:
            seed = int(torch.randint(1, 2**31 - 1, (), generator=self._proposals.generator))
            self.context.setVelocitiesToTemperature(self.temperature, seed)
        return accepted

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which moves continue with the same numbers; the Context has its own checkpoint."""
        return {"statistics": asdict(self.statistics), "proposals": self._proposals.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a result of :meth:`state_dict`."""
        self.statistics = MoveStatistics(**state["statistics"])
        self._proposals.load_state_dict(state["proposals"])

    def _decide(self, log_ratio: float) -> bool:
        self.statistics.proposed += 1
        # Drawn for every proposal, so that later random numbers do not depend on rounding in this one.
        threshold = math.log(
            max(float(torch.rand((), generator=self._proposals.generator, dtype=torch.float64)), 1e-300)
        )
        if not math.isfinite(log_ratio):
            self.statistics.not_finite += 1
            return False
        self.statistics.accepted += threshold < log_ratio
        return threshold < log_ratio

    def _energy_with(self, placed: FloatArray, present: FloatArray) -> float:
        try:
            self._set(placed)
            return _energy(self.context.getState(energy=True))
        except BaseException:
            self._set(present)
            raise

    def _set(self, molecule: FloatArray) -> None:
        self._positions[self.particles] = molecule
        self.context.setPositions(self._positions)

    def _refuse_broken(self, present: FloatArray, state: openmm.State) -> None:
        if not self.context.getSystem().usesPeriodicBoundaryConditions() or not len(self._bonds):
            return
        half = 0.5 * min(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer).diagonal())
        lengths = np.linalg.norm(present[self._bonds[:, 0]] - present[self._bonds[:, 1]], axis=1)
        worst = int(lengths.argmax())
        if lengths[worst] > half:
            i, j = self._bonds[worst]
            label = self.model.metadata.particles.label
            raise ConfigurationError(
                f"the bond from {label(i)} to {label(j)} is {lengths[worst]:.2f} nm long, more than half the box: the molecule "
                "is broken across the periodic boundary; make it whole before Context.setPositions"
            )


class BoltzmannMover:
    """Alternation of molecular dynamics of an ``openmm.app.Simulation`` with moves of a Boltzmann generator.

    Example::

        mover = BoltzmannMover(simulation, "alanine.flow", interval=500, seed=1)
        mover.step(1_000_000)                # reporters work as with simulation.step
        print(mover.statistics.acceptance)

    Args:
        simulation: Simulation with positions.
        model: a Boltzmann generator, or the path of its file.
        interval: number of steps of dynamics between moves.
        proposals: number of proposals of one move, one after the other.
        **options: options of :class:`BoltzmannMove`: particles, temperature, scale, anchors, seed, compilation.
    """

    def __init__(
        self,
        simulation: app.Simulation,
        model: BoltzmannGenerator | str | os.PathLike[str],
        *,
        interval: int,
        proposals: int = 1,
        **options: Any,
    ) -> None:
        if interval < 1 or proposals < 1:
            raise ConfigurationError(f"interval and proposals must be at least 1, got {interval} and {proposals}")
        self.simulation, self.interval, self.proposals = simulation, interval, proposals
        self.move = BoltzmannMove(simulation.context, model, topology=simulation.topology, **options)

    @property
    def statistics(self) -> MoveStatistics:
        """Counts of all moves so far."""
        return self.move.statistics

    def step(self, steps: int) -> None:
        """Make ``steps`` steps of dynamics, with a move whenever the simulation's step count is a multiple of the interval."""
        last = self.simulation.currentStep + steps
        while self.simulation.currentStep < last:
            self.simulation.step(
                min(self.interval - self.simulation.currentStep % self.interval, last - self.simulation.currentStep)
            )
            if self.simulation.currentStep % self.interval == 0:
                self.move.attempt(self.proposals)


def superposed(moved: FloatArray, reference: FloatArray, weights: FloatArray) -> FloatArray:
    """Return ``moved`` ``(N, 3)`` rotated and shifted onto ``reference`` with the least weighted square deviation.

    Kabsch, Acta Cryst. A 32, 922 (1976), without reflections.

    Args:
        moved: configuration to move.
        reference: configuration to superpose it on.
        weights: weights ``(N,)``, not negative.
    """
    fractions = weights / weights.sum()
    a, b = fractions @ moved, fractions @ reference
    # SciPy's Rotation.align_vectors warns for linear molecules.
    u, _, vt = np.linalg.svd((moved - a).T @ (fractions[:, None] * (reference - b)))
    turn = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    result: FloatArray = (moved - a) @ (u @ turn @ vt) + b
    return result


def _molecule(
    system: openmm.System,
    model: BoltzmannGenerator,
    topology: app.Topology | None,
    particles: Sequence[int] | None,
) -> list[int]:
    """Return the indices of the molecule after comparing it with the model."""
    chosen = matching_particles(system, model.metadata, topology, particles)
    fixed = [index for index in chosen if system.getParticleMass(index).value_in_unit(unit.dalton) == 0]
    if fixed:
        raise ConfigurationError(
            f"particle {fixed[0]} has mass 0 and stays in place in OpenMM, but a move would move it"
        )
    return chosen


def _temperature(integrator: openmm.Integrator, given: float | None, model: BoltzmannGenerator) -> float:
    """Return the temperature of the Context's ensemble."""
    known = None
    if hasattr(integrator, "getTemperature"):
        found = integrator.getTemperature()
        known = float(found.value_in_unit(unit.kelvin) if unit.is_quantity(found) else found)
    if given is not None and known is not None and abs(given - known) > _SAME_TEMPERATURE:
        raise ConfigurationError(
            f"temperature={given} K, but the integrator of the Context keeps {known} K: give the same, or leave it out"
        )
    temperature = known if given is None else given
    if temperature is None:
        raise ConfigurationError(
            f"a {type(integrator).__name__} has no temperature: give that of the ensemble as temperature= (K)"
        )
    trained = model.metadata.temperature
    if trained is not None and abs(trained - temperature) > _SAME_TEMPERATURE:
        warnings.warn(
            f"the generator was trained for {trained} K and proposes at {temperature} K: moves stay exact, fewer are accepted",
            stacklevel=4,
        )
    return temperature


def _anchor_weights(model: BoltzmannGenerator, anchors: Sequence[int] | None) -> FloatArray:
    masses = np.array(model.metadata.particles.masses)
    if anchors is None:
        return masses
    chosen = sorted(set(anchors))
    if len(chosen) < 3 or chosen[0] < 0 or chosen[-1] >= len(masses):
        raise ConfigurationError(
            f"anchors must name at least three different atoms of the molecule, 0..{len(masses) - 1}, got {list(anchors)}"
        )
    weights = np.zeros(len(masses))
    weights[chosen] = masses[chosen]
    return weights


def _energy(state: openmm.State) -> float:
    return float(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
