"""Annealed importance sampling with OpenMM's Langevin dynamics, from a Boltzmann generator to a force field.

Short Langevin dynamics starts from samples of an imperfect flow; its forces change, step by step, from the flow's to the force
field's. Every path has an exact weight for any time step, because the weight includes the shadow work of the integrator
(Sivak, Chodera, Crooks 2013).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from ....core.errors import ConfigurationError, NonFiniteEnergyError
from ....core.potential import Potential
from ....core.samples import WeightedSamples
from ....core.units import thermal_energy
from ....flows.boltzmann.generator import BoltzmannGenerator
from ....flows.stochastic.annealed_importance_sampling import annealed_importance_sampling
from ....flows.stochastic.distributions import InterpolatedEnergy
from ....flows.stochastic.kernels import Kernel, Moved
from ....flows.stochastic.molecules import GeneratorPrior, PositionEnergy, samples_of_paths
from ....flows.stochastic.resampling import Resampling
from ..energies.batched import OpenMMEnergy
from ..forces.add_potential import add_potential
from .dynamics import copy_vectors, reason_of, reference_context

_TARGET_GROUP, _PRIOR_GROUP = 0, 1


class OpenMMLangevinKernel(Kernel):
    """Langevin dynamics in OpenMM as a kernel over Cartesian positions ``(B, 3 N)`` in nm.

    The splitting is kick, drift, heat bath, drift, kick (Leimkuhler and Matthews 2013); velocities are drawn at the start and
    discarded at the end. Kicks and drifts preserve volume and the heat bath preserves the distribution of velocities, so the
    log-ratio is minus the kinetic energy that kicks add, over kT. Forces are ``fraction`` times the System's plus
    ``1 - fraction`` times the prior's; only the fraction of the stochastic flow's energy is read. The kernel is not
    differentiable: it serves sampling, not training.

    Args:
        system: target System without constraints and virtual sites; not changed.
        temperature: temperature, K.
        step_ps: time step, ps.
        steps: number of steps.
        friction: friction, 1/ps.
        prior: potential at fraction 0, or the path of its model file; without one the fraction must be 1.
        compilation: compilation mode of the prior; see :func:`~flowbridge.integrations.openmm.forces.add_potential`.

    Raises:
        ConfigurationError: for constraints, massless particles, or numbers that are not positive.
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: float,
        step_ps: float,
        steps: int,
        friction: float,
        *,
        prior: Potential | str | os.PathLike[str] | None = None,
        compilation: str = "auto",
    ) -> None:
        super().__init__(step_ps, steps)
        if not friction > 0.0:
            raise ConfigurationError(f"the friction must be positive, got {friction}")
        self.friction = friction
        self.thermal_energy = thermal_energy(temperature)
        self.masses = _masses(system)
        self.has_prior = prior is not None
        self._system = copy.deepcopy(system)
        for force in self._system.getForces():
            force.setForceGroup(_TARGET_GROUP)
        if prior is not None:
            add_potential(self._system, prior, force_group=_PRIOR_GROUP, compilation=compilation)

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """See :meth:`Kernel.forward`.

        Raises:
            NonFiniteEnergyError: when OpenMM cannot continue from a configuration.
            ConfigurationError: when gradients are being recorded, or a fraction below 1 needs a prior.
        """
        if torch.is_grad_enabled() and value.requires_grad:
            raise ConfigurationError("OpenMM's dynamics cannot be differentiated: sample without recording gradients")
        fraction = float(energy.fraction)
        if not self.has_prior and fraction != 1.0:
            raise ConfigurationError(f"the kernel works at fraction {fraction} and was given no prior")
        positions = np.ascontiguousarray(value.detach().double().numpy()).reshape(len(value), -1, 3)
        if positions.shape[1] != len(self.masses):
            raise ConfigurationError(f"the System has {len(self.masses)} particles, positions {positions.shape[1]}")
        width = np.sqrt(self.thermal_energy / self.masses)[None, :, None]
        velocities = width * torch.randn(positions.shape, generator=generator, dtype=torch.float64).numpy()
        seed = int(torch.randint(1, 2**31 - 1, (), generator=generator))
        moved, work = self._run(positions, velocities, fraction, seed)
        ratio = torch.as_tensor(-work / self.thermal_energy)
        return Moved(torch.as_tensor(moved).flatten(1).to(value.dtype), ratio)

    def _run(
        self, positions: np.ndarray[Any, Any], velocities: np.ndarray[Any, Any], fraction: float, seed: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return final positions ``(B, N, 3)`` nm and the work of kicks ``(B,)`` kJ/mol."""
        integrator = self._integrator(fraction)
        integrator.setRandomNumberSeed(seed)
        context = reference_context(self._system, integrator)
        moved, work = np.empty_like(positions), np.empty(len(positions))
        for index in range(len(positions)):
            try:
                context.setPositions(positions[index])
                context.setVelocities(velocities[index])
                integrator.setGlobalVariableByName("work", 0.0)
                integrator.step(self.steps)
                copy_vectors(context.getState(positions=True), moved[index])
                work[index] = integrator.getGlobalVariableByName("work")
            except openmm.OpenMMException as error:
                raise NonFiniteEnergyError(
                    f"OpenMM stopped at fraction {fraction:.3g}, configuration {index}: {reason_of(error)}"
                ) from error
        broken = np.flatnonzero(~np.isfinite(work) | ~np.isfinite(moved).all((1, 2)))
        if len(broken):
            raise NonFiniteEnergyError(
                f"Langevin dynamics at fraction {fraction:.3g} has exploded for {len(broken)} of {len(work)} configurations, "
                f"the first at index {broken[0]}: shorten the time step ({float(self.log_step.exp()):.2g} ps), or train the "
                "flow longer"
            )
        return moved, work

    def _integrator(self, fraction: float) -> openmm.CustomIntegrator:
        step = float(self.log_step.exp())
        integrator = openmm.CustomIntegrator(step)
        keep = np.exp(-self.friction * step)
        for name, start in (
            ("fraction", fraction),
            ("keep", keep),
            ("heat", np.sqrt((1.0 - keep * keep) * self.thermal_energy)),
            ("work", 0.0),
            ("before", 0.0),
            ("after", 0.0),
        ):
            integrator.addGlobalVariable(name, float(start))

        def kick() -> None:
            integrator.addComputeSum("before", "0.5*m*v*v")
            # One computation may read the forces of one group only.
            integrator.addComputePerDof("v", f"v+0.5*dt*fraction*f{_TARGET_GROUP}/m")
            if self.has_prior:
                integrator.addComputePerDof("v", f"v+0.5*dt*(1-fraction)*f{_PRIOR_GROUP}/m")
            integrator.addComputeSum("after", "0.5*m*v*v")
            integrator.addComputeGlobal("work", "work+after-before")

        kick()
        integrator.addComputePerDof("x", "x+0.5*dt*v")
        integrator.addComputePerDof("v", "keep*v+heat*gaussian/sqrt(m)")
        integrator.addComputePerDof("x", "x+0.5*dt*v")
        kick()
        return integrator


def annealed_samples(
    model: BoltzmannGenerator | str | os.PathLike[str],
    system: openmm.System,
    count: int,
    *,
    fractions: Sequence[float] | int = 10,
    steps: int = 20,
    step_ps: float = 0.0005,
    friction: float = 5.0,
    seed: int = 0,
    resampling: Resampling | None = None,
    compilation: str = "auto",
) -> WeightedSamples:
    """Draw samples of a Boltzmann generator and anneal them to a force field by Langevin dynamics, with exact weights.

    Args:
        model: the generator, or the path of its model file.
        system: target System of the same particles, without constraints, at the generator's temperature.
        count: number of paths; each costs ``rungs * steps`` evaluations of both forces, one after the other on one core.
        fractions: increasing fractions of the target's energy, one per rung; or the number of rungs.
        steps: number of time steps on each rung.
        step_ps: time step, ps; its error is in the weights, so a long step only lowers the effective sample size.
        friction: friction, 1/ps.
        seed: random seed.
        resampling: see :meth:`~flowbridge.flows.stochastic.stochastic_flow.StochasticFlow.sample`.
        compilation: compilation mode of the generator; see :func:`~flowbridge.integrations.openmm.forces.add_potential`.

    Raises:
        ConfigurationError: for constraints, or a model without a temperature or that is no Boltzmann generator.
        NonFiniteEnergyError: when dynamics cannot continue, or no path has a weight.
        MoleculeMismatchError: when model and System have different particles.
    """
    generator = BoltzmannGenerator.of(model)
    temperature = generator.temperature
    kernel = OpenMMLangevinKernel(system, temperature, step_ps, steps, friction, prior=model, compilation=compilation)
    energy = OpenMMEnergy(system)
    target = PositionEnergy(energy, temperature)
    ladder = annealed_importance_sampling(GeneratorPrior(generator), target, lambda _: kernel, fractions)
    paths = ladder.sample(count, torch.Generator().manual_seed(seed), resampling)
    with torch.no_grad():
        work = paths.log_weights.double() + target(paths.value)
    settings = {"fractions": list(ladder.schedule.given), "steps": steps, "step_ps": step_ps, "friction": friction}
    return samples_of_paths(
        paths,
        paths.value.unflatten(1, (-1, 3)),
        work,
        energy,
        generator.metadata.particles,
        temperature,
        {"seed": seed, "annealing": settings},
    )


def _masses(system: openmm.System) -> np.ndarray[Any, np.dtype[np.float64]]:
    if system.getNumConstraints():
        raise ConfigurationError(
            f"the System has {system.getNumConstraints()} constraints, and path weights need a System without them: create "
            "it with constraints=None"
        )
    masses = [system.getParticleMass(index).value_in_unit(unit.dalton) for index in range(system.getNumParticles())]
    if min(masses, default=0.0) <= 0.0:
        raise ConfigurationError("the System has a particle without mass (a virtual site, or one held in place)")
    return np.array(masses)
