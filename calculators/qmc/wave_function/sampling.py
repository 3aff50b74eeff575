"""Sampling |Psi|^2: Metropolis-adjusted Langevin moves of all electrons, with step sizes that shrink near nuclei.

Every walker is a Markov chain of its own, so that averages over its time are independent between walkers, and error
bars come from their scatter without any model of correlation in time.
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

TARGET_ACCEPTANCE = 0.6
_LONGEST_SQUARE = 1.5  # bohr^2; scale of a step far from all nuclei
_DRIFT_LIMIT = 5.0  # standard errors by which the energy may change along the production run


@dataclass(frozen=True)
class SamplingSettings:
    """How |Psi|^2 is sampled.

    Attributes:
        walkers: Markov chains side by side.
        equilibration: moves before anything is recorded; the step size is adapted meanwhile, and never later.
        sweeps: recorded configurations of each walker.
        interval: moves between recorded configurations.

    Raises:
        ConfigurationError: for numbers that make no run.
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
    """Where a sampler stands; with it a run continues as if it had not stopped.

    Attributes:
        positions: ``(W, N, 3)`` in bohr.
        step: scale of the steps, dimensionless.
        generator_state: of the random numbers.
        acceptance: fraction of accepted moves since the step was last changed.
    """

    positions: Tensor
    step: float
    generator_state: Tensor
    acceptance: float = 0.0


@dataclass(frozen=True)
class ElectronSamples:
    """Recorded configurations of electrons with what densities are fitted to.

    Attributes:
        molecule: nuclei and electrons, spin up first.
        positions: ``(S, W, N, 3)`` in bohr: S configurations of each of W independent walkers.
        scores: ``(S, W, N, 3)``, gradients of ``ln |Psi|^2`` by each electron.
        kinetic: ``(S, W)`` Hartree; of the local energy.
        potential: ``(S, W)`` Hartree.
        acceptance: fraction of accepted moves.
        log_absolute: ``(S, W)`` of ln|Psi|, for reweighting to another wave function; None where it was not recorded.
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
        """``(S, W)`` in Hartree."""
        return self.kinetic + self.potential

    def electrons_of(self, spin: str) -> slice:
        """Return which electrons have the spin ``"up"`` or ``"down"``; all of them for ``"total"``.

        Raises:
            ConfigurationError: for another word.
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
        """Of the wave function, Hartree."""
        return self.average(self.local_energy)

    @property
    def variance(self) -> float:
        """Of the local energy, Hartree^2: zero for an exact wave function."""
        return float(self.local_energy.var())

    def correlation_sweeps(self) -> float:
        """Return how many sweeps of a walker are worth one independent configuration, for the energy."""
        energies = self.local_energy
        within = float(energies.var())
        if within < 1e-12:
            return 1.0
        return max(1.0, float(energies.mean(0).var()) / within * len(energies))

    def check_equilibrium(self) -> None:
        """Compare the first third of the run with the last, walker by walker: energies and the size of the electron cloud.

        Raises:
            ConvergenceError: when one of them drifted by more than chance explains, or hardly any move was accepted.
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


class EquilibriumError(ConvergenceError):
    """Samples that are not in equilibrium.

    Attributes:
        samples: what was recorded.
    """

    def __init__(self, message: str, samples: ElectronSamples) -> None:
        super().__init__(message)
        self.samples = samples


def initial_positions(molecule: Molecule, walkers: int, generator: torch.Generator) -> Tensor:
    """Return electrons ``(W, N, 3)`` in Gaussians around the nuclei, as many as each nucleus has charge, spins in turn."""
    owners: list[list[int]] = [[], []]
    turn = 0
    for center, number in enumerate(molecule.numbers):
        for _ in range(number):
            owners[turn % 2].append(center)
            turn += 1
    wanted = (molecule.spin_up, molecule.spin_down)
    for spin in (0, 1):  # what one spin has too many goes to the other, as in ions and open shells
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
    """Walkers of one wave function.

    A step of electron i has the variance ``step * h(r_i)`` with ``1/h = 1/1.5 + sum_A 1/(|r - R_A|^2 + 1/Z_A^2)``: small in a
    core, long in the valence. The proposal follows the drift, which is limited near nodes (C. J. Umrigar, M. P.
    Nightingale and K. J. Runge, J. Chem. Phys. 99, 2865, 1993), and is corrected exactly by Metropolis and Hastings.

    Args:
        wave_function: to sample.
        generator: of the random numbers.
        positions: where to start ``(W, N, 3)``.
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
        """Return the sampler that was in ``state``."""
        generator = torch.Generator()
        generator.set_state(state.generator_state)
        return cls(wave_function, generator, state.positions, state.step)

    @property
    def state(self) -> SamplerState:
        """Where it stands."""
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
        accepted = uniform.log() < ratio  # false for NaN: a proposal onto a node stays out
        self.positions = torch.where(accepted[:, None, None], new, old)
        self._values = WaveFunctionValues(
            torch.where(accepted, proposed.log_absolute, values.log_absolute),
            torch.where(accepted[:, None, None], proposed.gradient, values.gradient),
        )
        self._accepted += int(accepted.sum())
        self._moves += len(old)

    def equilibrate(self, moves: int) -> None:
        """Move, and adapt the step to the acceptance that is aimed at; it stays as it is afterwards."""
        for start in range(0, moves, 10):
            self._accepted = self._moves = 0
            for _ in range(min(10, moves - start)):
                self.move()
            self.step *= min(1.4, max(0.7, (self.acceptance + 0.05) / (TARGET_ACCEPTANCE + 0.05)))
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
        sampler: the walkers.
        settings: how many to record.
        recorded: what a run recorded before it was interrupted.
        checkpoint: called now and then with everything recorded so far and the sampler's state.
        progress: called with the number of sweeps done.

    Raises:
        EquilibriumError: when the walkers drifted or hardly moved; it carries the samples, so that they are not lost.
        NonFiniteEnergyError: for a NaN or infinite local energy.
    """
    if recorded is not None and recorded.log_absolute is None:
        raise ConfigurationError("the recorded part lacks ln|Psi|, so that it was not recorded here: start anew")
    shape = (settings.sweeps, *sampler.positions.shape)
    positions, scores = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    kinetic, potential, log_absolute = torch.empty(3, *shape[:2], dtype=torch.float64)
    done = 0
    if recorded is not None and recorded.log_absolute is not None:
        done = min(len(recorded.positions), settings.sweeps)
        positions[:done], scores[:done] = recorded.positions[:done], recorded.scores[:done]
        kinetic[:done], potential[:done] = recorded.kinetic[:done], recorded.potential[:done]
        log_absolute[:done] = recorded.log_absolute[:done]

    def so_far(count: int) -> ElectronSamples:
        return ElectronSamples(
            sampler.wave_function.molecule,
            positions[:count], scores[:count], kinetic[:count], potential[:count],
            sampler.acceptance if sampler.acceptance or recorded is None else recorded.acceptance,
            log_absolute[:count],
        )  # fmt: skip

    for sweep in range(done, settings.sweeps):
        for _ in range(settings.interval):
            sampler.move()
        found = sampler.wave_function.local_energy(sampler.positions)
        positions[sweep], scores[sweep] = sampler.positions, 2.0 * found.gradient
        kinetic[sweep], potential[sweep], log_absolute[sweep] = found.kinetic, found.potential, found.log_absolute
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
