"""Sampling |Psi|^2: Metropolis-adjusted Langevin moves of all electrons, with step sizes that shrink near nuclei.

Walkers are independent Markov chains, so their time averages are independent, and error bars follow from their standard
deviation without a model of correlation in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.errors import ConfigurationError, ConvergenceError, NonFiniteEnergyError
from ....core.statistics.bootstrap import Estimate
from ..molecule import Molecule
from .wave_function import WaveFunction, WaveFunctionValues

DESIRED_ACCEPTANCE = 0.6
_LONGEST_SQUARE = 1.5  # bohr^2; scale of a step far from all nuclei
_DRIFT_LIMIT = 5.0  # standard errors by which the energy may change along the production run


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler of |Psi|^2.

    Attributes:
        walkers: number of Markov chains.
        equilibration: number of moves before the first recorded configuration; only they adapt the step size.
        sweeps: number of recorded configurations of each walker.
        interval: number of moves between recorded configurations.

    Raises:
        ConfigurationError: for numbers that are too small.
    """

    walkers: int = 1024
    equilibration: int = 300
    sweeps: int = 60
    interval: int = 8

    def __post_init__(self) -> None:
        if self.walkers < 32 or self.equilibration < 0 or self.sweeps < 3 or self.interval < 1:
            raise ConfigurationError(
                f"sampling needs at least 32 walkers, 3 sweeps and an interval of 1, got {self}: fewer give no error bars"
            )


@dataclass(frozen=True)
class SamplerState:
    """State of a sampler, from which a run continues as if it had not stopped.

    Attributes:
        positions: positions ``(W, N, 3)`` in bohr.
        step: scale of the steps, dimensionless.
        generator_state: state of the random numbers.
        acceptance: fraction of accepted moves since the step was last changed.
    """

    positions: Tensor
    step: float
    generator_state: Tensor
    acceptance: float = 0.0


@dataclass(frozen=True)
class ElectronSamples:
    """Recorded configurations of electrons with scores and energies.

    Attributes:
        molecule: nuclei and electrons, spin up first.
        positions: positions ``(S, W, N, 3)`` in bohr: S configurations of each of W independent walkers.
        scores: gradients ``(S, W, N, 3)`` of ``ln |Psi|^2`` by each electron.
        kinetic: kinetic part ``(S, W)`` of the local energy, Hartree.
        potential: potential part ``(S, W)`` of the local energy, Hartree.
        acceptance: fraction of accepted moves.
        log_absolute: ln|Psi| ``(S, W)``, for reweighting to another wave function; None where it was not recorded.
    """

    molecule: Molecule
    positions: Tensor
    scores: Tensor
    kinetic: Tensor
    potential: Tensor
    acceptance: float
    log_absolute: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (*self.kinetic.shape, self.molecule.electrons, 3)
        if self.log_absolute is not None and self.log_absolute.shape != self.kinetic.shape:
            raise ConfigurationError(
                f"ln|Psi| must have the shape {tuple(self.kinetic.shape)} of the energies, got {tuple(self.log_absolute.shape)}"
            )
        if self.kinetic.ndim != 2 or self.positions.shape != expected or self.scores.shape != expected:
            raise ConfigurationError(
                f"samples of {self.molecule.electrons} electrons must have the shape (sweeps, walkers, electrons, 3), got "
                f"positions {tuple(self.positions.shape)}, scores {tuple(self.scores.shape)}, energies "
                f"{tuple(self.kinetic.shape)}"
            )

    @property
    def local_energy(self) -> Tensor:
        """Local energy ``(S, W)``, Hartree."""
        return self.kinetic + self.potential

    def electrons_of(self, spin: str) -> slice:
        """Return the electrons with the spin ``"up"`` or ``"down"``; all of them for ``"total"``.

        Raises:
            ConfigurationError: for another spin.
        """
        up, all_of_them = self.molecule.spin_up, self.molecule.electrons
        found = {"total": slice(0, all_of_them), "up": slice(0, up), "down": slice(up, all_of_them)}.get(spin)
        if found is None:
            raise ConfigurationError(f"spin must be total, up or down, got {spin!r}")
        return found

    def average(self, values: Tensor) -> Estimate[float]:
        """Return mean and standard error of a quantity ``(S, W)``, from independent walkers."""
        means = values.mean(0)
        return Estimate(float(means.mean()), float(means.std()) / math.sqrt(len(means)))

    @property
    def energy(self) -> Estimate[float]:
        """Energy of the wave function, Hartree."""
        return self.average(self.local_energy)

    @property
    def variance(self) -> float:
        """Variance of the local energy, Hartree^2: zero for an exact wave function."""
        return float(self.local_energy.var())

    def correlation_sweeps(self) -> float:
        """Return the number of sweeps of a walker per independent configuration, for the energy."""
        energies = self.local_energy
        within = float(energies.var())
        if within < 1e-12:
            return 1.0
        return max(1.0, float(energies.mean(0).var()) / within * len(energies))

    def check_equilibrium(self) -> None:
        """Compare energies and the size of the electron cloud in the first and last third of the run, walker by walker.

        Raises:
            ConvergenceError: when one of them drifted significantly, or hardly any move was accepted.
            NonFiniteEnergyError: for a NaN or infinite local energy.
        """
        energies = self.local_energy
        bad = int((~torch.isfinite(energies)).sum())
        if bad:
            raise NonFiniteEnergyError(f"{bad} of {energies.numel()} local energies are NaN or infinite")
        if not 0.05 < self.acceptance <= 1.0:
            raise ConvergenceError(
                f"only {100 * self.acceptance:.1f} % of the moves were accepted: the walkers hardly move. Equilibrate longer, "
                "so that the step is adapted, or look for a wave function that went astray"
            )
        size = (self.positions - self.molecule.centers.mean(0)).square().sum((2, 3)).sqrt()
        for name, values in (
            ("local energy", energies),
            ("potential energy", self.potential),
            ("size of the electron cloud", size),
        ):
            third = len(values) // 3
            change = values[-third:].mean(0) - values[:third].mean(0)
            mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
            if abs(mean) > _DRIFT_LIMIT * error + 1e-6:
                raise ConvergenceError(
                    f"the walkers were not in equilibrium: the {name} changed by {mean:.4f} (atomic units) from the first to "
                    f"the last third of the run, {abs(mean) / max(error, 1e-12):.0f} standard errors. Equilibrate longer "
                    "(equilibration=...)"
                )


def walker_groups(walkers: int, groups: int) -> Tensor:
    """Return the group ``(W,)`` of each walker in a jackknife."""
    return torch.arange(walkers) * groups // walkers


def leave_one_out(sums: Tensor) -> Tensor:
    """Return ``(1 + G, ...)``: the total of the sums ``(G, ...)`` of G groups, then the totals with one group left out."""
    groups = range(len(sums))
    return torch.stack([sums[[one for one in groups if one != left_out]].sum(0) for left_out in (None, *groups)])


class EquilibriumError(ConvergenceError):
    """Samples that are not in equilibrium.

    Attributes:
        samples: recorded samples.
    """

    def __init__(self, message: str, samples: ElectronSamples) -> None:
        super().__init__(message)
        self.samples = samples


def initial_positions(molecule: Molecule, walkers: int, generator: torch.Generator) -> Tensor:
    """Return electrons ``(W, N, 3)`` in Gaussians around the nuclei, by nuclear charge, with alternating spins."""
    owners: list[list[int]] = [[], []]
    turn = 0
    for center, number in enumerate(molecule.numbers):
        for _ in range(number):
            owners[turn % 2].append(center)
            turn += 1
    wanted = (molecule.spin_up, molecule.spin_down)
    for spin in (0, 1):  # surplus electrons of one spin go to the other, as in ions and open shells
        while len(owners[spin]) > wanted[spin] and len(owners[1 - spin]) < wanted[1 - spin]:
            owners[1 - spin].append(owners[spin].pop())
    heaviest = max(range(len(molecule.numbers)), key=lambda index: molecule.numbers[index])
    for spin in (0, 1):
        del owners[spin][wanted[spin] :]
        owners[spin] += [heaviest] * (wanted[spin] - len(owners[spin]))
    nuclei = molecule.centers[torch.tensor(owners[0] + owners[1])]
    noise = torch.randn(walkers, molecule.electrons, 3, generator=generator, dtype=torch.float64)
    return nuclei + 0.6 * noise


class LangevinSampler:
    """Metropolis-adjusted Langevin sampler of one wave function.

    A step of electron i has the variance ``step * h(r_i)`` with ``1/h = 1/1.5 + sum_A 1/(|r - R_A|^2 + 1/Z_A^2)``: small in a
    core, long in the valence. The proposal follows the drift, which is limited near nodes (C. J. Umrigar, M. P.
    Nightingale and K. J. Runge, J. Chem. Phys. 99, 2865, 1993), and is accepted by Metropolis-Hastings.

    Args:
        wave_function: wave function to sample.
        generator: generator of the random numbers.
        positions: starting positions ``(W, N, 3)``.
        step: scale of the steps.
    """

    def __init__(
        self, wave_function: WaveFunction, generator: torch.Generator, positions: Tensor, step: float = 0.3
    ) -> None:
        self.wave_function, self.generator, self.step = wave_function, generator, step
        molecule = wave_function.molecule
        self._centers, self._core = molecule.centers, molecule.charges**-2
        self.positions = positions
        self._values = wave_function.evaluate(positions)
        self._accepted = self._moves = 0

    @classmethod
    def resumed(cls, wave_function: WaveFunction, state: SamplerState) -> LangevinSampler:
        """Return a sampler in the given state."""
        generator = torch.Generator()
        generator.set_state(state.generator_state)
        return cls(wave_function, generator, state.positions, state.step)

    @property
    def state(self) -> SamplerState:
        """Present state."""
        return SamplerState(self.positions.clone(), self.step, self.generator.get_state(), self.acceptance)

    @property
    def acceptance(self) -> float:
        """Fraction of accepted moves since the step was last changed."""
        return self._accepted / self._moves if self._moves else 0.0

    def move(self) -> None:
        """Propose one move of all electrons of every walker."""
        old, values = self.positions, self._values
        noise = torch.randn(old.shape, generator=self.generator, dtype=old.dtype)
        variance, drift = self._proposal(old, values.gradient)
        new = old + drift + variance.sqrt() * noise
        proposed = self.wave_function.evaluate(new)
        back_variance, back_drift = self._proposal(new, proposed.gradient)
        forward = -0.5 * noise.square().sum((1, 2)) - 1.5 * variance.log().sum((1, 2))
        backward = -0.5 * ((old - new - back_drift).square() / back_variance).sum(
            (1, 2)
        ) - 1.5 * back_variance.log().sum((1, 2))
        ratio = 2.0 * (proposed.log_absolute - values.log_absolute) + backward - forward
        uniform = torch.rand(len(old), generator=self.generator, dtype=old.dtype)
        accepted = uniform.log() < ratio  # false for NaN: a proposal on a node is rejected
        self.positions = torch.where(accepted[:, None, None], new, old)
        self._values = WaveFunctionValues(
            torch.where(accepted, proposed.log_absolute, values.log_absolute),
            torch.where(accepted[:, None, None], proposed.gradient, values.gradient),
        )
        self._accepted += int(accepted.sum())
        self._moves += len(old)

    def equilibrate(self, moves: int) -> None:
        """Move, and adapt the step to the desired acceptance; later moves do not change it."""
        for start in range(0, moves, 10):
            self._accepted = self._moves = 0
            for _ in range(min(10, moves - start)):
                self.move()
            self.step *= min(1.4, max(0.7, (self.acceptance + 0.05) / (DESIRED_ACCEPTANCE + 0.05)))
        self._accepted = self._moves = 0

    def _proposal(self, positions: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return variance ``(W, N, 1)`` and drift ``(W, N, 3)`` of the proposal from ``positions``."""
        square = (positions[:, :, None] - self._centers).square().sum(3)
        variance = self.step / (1.0 / _LONGEST_SQUARE + (1.0 / (square + self._core)).sum(2, keepdim=True))
        size = 2.0 * gradient.square().sum(2, keepdim=True) * variance
        # (sqrt(1 + x) - 1)/(x/2), without the cancellation at small x.
        return variance, gradient * variance * (2.0 / (1.0 + (1.0 + size).sqrt()))


def sample(
    sampler: LangevinSampler,
    settings: SamplingSettings,
    *,
    recorded: ElectronSamples | None = None,
    checkpoint: Callable[[ElectronSamples, SamplerState], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> ElectronSamples:
    """Record configurations of a sampler that is in equilibrium.

    Args:
        sampler: equilibrated sampler.
        settings: numbers of sweeps and moves.
        recorded: samples of an interrupted run.
        checkpoint: function that regularly receives all samples so far and the sampler's state.
        progress: function that receives the number of sweeps done.

    Raises:
        EquilibriumError: when the walkers drifted or hardly moved; it holds the samples, so that they are not lost.
        NonFiniteEnergyError: for a NaN or infinite local energy.
    """
    if recorded is not None and recorded.log_absolute is None:
        raise ConfigurationError("the recorded part lacks ln|Psi|, so that it was not recorded here: start again")
    whole, flat = (settings.sweeps, *sampler.positions.shape), (settings.sweeps, len(sampler.positions))
    shapes = {"positions": whole, "scores": whole, "kinetic": flat, "potential": flat, "log_absolute": flat}
    arrays = {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()}
    done = 0
    if recorded is not None:
        done = min(len(recorded.positions), settings.sweeps)
        for name, array in arrays.items():
            array[:done] = getattr(recorded, name)[:done]

    def so_far(count: int) -> ElectronSamples:
        acceptance = sampler.acceptance if sampler.acceptance or recorded is None else recorded.acceptance
        parts = {name: array[:count] for name, array in arrays.items()}
        return ElectronSamples(sampler.wave_function.molecule, acceptance=acceptance, **parts)

    for sweep in range(done, settings.sweeps):
        for _ in range(settings.interval):
            sampler.move()
        found = sampler.wave_function.local_energy(sampler.positions)
        values = (sampler.positions, 2.0 * found.gradient, found.kinetic, found.potential, found.log_absolute)
        for array, value in zip(arrays.values(), values, strict=True):
            array[sweep] = value
        if progress is not None:
            progress(sweep + 1)
        if checkpoint is not None and (sweep + 1) % 20 == 0:
            checkpoint(so_far(sweep + 1), sampler.state)
    samples = so_far(settings.sweeps)
    try:
        samples.check_equilibrium()
    except ConvergenceError as error:
        raise EquilibriumError(str(error), samples) from error
    return samples
