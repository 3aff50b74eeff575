"""The linear method: wave-function parameters from a small eigenvalue problem, in a few iterations.

J. Toulouse and C. J. Umrigar, J. Chem. Phys. 126, 084102 (2007). The wave function is expanded to first order in its
parameters, and the Hamiltonian is diagonalised in the space of its derivatives, with matrix elements from one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from ....core.errors import ConfigurationError, ConvergenceError
from ....core.statistics.bootstrap import Estimate
from .sampling import LangevinSampler, SamplerState, initial_positions
from .wave_function import SlaterJastrow

VARIANCE_PART = 0.1
"""Weight of the variance (Hartree^-1) relative to the energy in the minimised function, after C. J. Umrigar and C. Filippi,
Phys. Rev. Lett. 94, 150201 (2005)."""

_OVERLAP_SHIFT = 1e-4
_ENERGY_SHIFT = 0.02  # Hartree
_FARTHEST = 5.0  # Hartree; a first Jastrow factor may cost a tenth of a Hartree for each electron
_LONGEST_STEP = 0.5  # in the norm of the overlap
_OUTLIERS = (
    12.0  # standard deviations of the local energy; a tighter cut hides close pairs, and the function goes astray
)


@dataclass(frozen=True)
class OptimisationSettings:
    """Settings of the optimisation of a wave function.

    Attributes:
        iterations: number of iterations of the linear method.
        sweeps: number of configurations of each walker in the first iteration; each further iteration has twice as many,
            since the last ones determine the noise of the parameters.
        interval: number of moves between configurations.
        equilibration: number of moves before the first iteration; a fifth of it before each further one.

    Raises:
        ConfigurationError: for numbers that are too small.
    """

    iterations: int = 4
    sweeps: int = 10
    interval: int = 4
    equilibration: int = 250

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.sweeps < 2 or self.interval < 1 or self.equilibration < 0:
            raise ConfigurationError(f"optimisation needs at least 2 sweeps, got {self}")


@dataclass(frozen=True)
class OptimisationStep:
    """One iteration.

    Attributes:
        energy: energy of the wave function before the step, Hartree.
        variance: variance of its local energy, Hartree^2.
        length: length of the step in the norm of the overlap.
    """

    energy: Estimate[float]
    variance: float
    length: float


@dataclass(frozen=True)
class OptimisationState:
    """State of an optimisation, from which it continues as if it had not stopped.

    Attributes:
        wave_function: wave function after the last step.
        sampler: state of its walkers.
        history: results of the iterations.
    """

    wave_function: SlaterJastrow
    sampler: SamplerState
    history: tuple[OptimisationStep, ...] = ()


def start_optimisation(
    wave_function: SlaterJastrow, walkers: int, settings: OptimisationSettings, generator: torch.Generator
) -> OptimisationState:
    """Return walkers in equilibrium, before the first iteration."""
    sampler = LangevinSampler(wave_function, generator, initial_positions(wave_function.molecule, walkers, generator))
    sampler.equilibrate(settings.equilibration)
    return OptimisationState(wave_function, sampler.state)


def optimise(start: OptimisationState, settings: OptimisationSettings) -> Iterator[OptimisationState]:
    """Yield the state after each remaining iteration.

    Raises:
        ConvergenceError: when the energy rises, or the eigenvalue problem has no solution near the present energy.
    """
    wave_function, history = start.wave_function, list(start.history)
    if sum(wave_function.parameter_counts) == 0:
        return
    sampler = LangevinSampler.resumed(wave_function, start.sampler)
    for iteration in range(len(history), settings.iterations):
        logarithms, energies, local = _collected(
            wave_function, sampler, settings.sweeps * 2**iteration, settings.interval
        )
        means = local.mean(0)
        energy = Estimate(float(means.mean()), float(means.std()) / math.sqrt(len(means)))
        step, length = linear_step(logarithms.flatten(0, 1), energies.flatten(0, 1), local.flatten())
        history.append(OptimisationStep(energy, float(local.var()), length))
        best = min(history, key=lambda done: done.energy.value).energy
        if energy.value > best.value + 6.0 * math.hypot(energy.error, best.error) + 0.02:
            raise ConvergenceError(
                f"the optimisation diverges: the energy rose from {best.value:.4f} to {energy.value:.4f} Hartree in iteration "
                f"{iteration + 1}. Use more walkers or sweeps in an iteration, or fewer virtual orbitals"
            )
        wave_function = wave_function.stepped(step)
        sampler = LangevinSampler(wave_function, sampler.generator, sampler.positions, sampler.step)
        sampler.equilibrate(max(20, settings.equilibration // 5))
        yield OptimisationState(wave_function, sampler.state, tuple(history))


def _collected(
    wave_function: SlaterJastrow, sampler: LangevinSampler, sweeps: int, interval: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return derivatives ``(S, W, P)`` of ln|Psi| and of the local energy, and the local energy ``(S, W)``."""
    found = []
    for _ in range(sweeps):
        for _ in range(interval):
            sampler.move()
        found.append(wave_function.parameter_derivatives(sampler.positions))
    return (
        torch.stack([part.logarithms for part in found]),
        torch.stack([part.energies for part in found]),
        torch.stack([part.local_energy for part in found]),
    )


def linear_step(logarithms: Tensor, energies: Tensor, local: Tensor) -> tuple[Tensor, float]:
    """Return the change of the parameters ``(P,)`` and its length, from one sample of |Psi|^2.

    Args:
        logarithms: derivatives ``(S, P)`` of ln|Psi|.
        energies: derivatives ``(S, P)`` of the local energy.
        local: local energies ``(S,)``, Hartree.

    Raises:
        ConvergenceError: when no eigenvalue lies near the present energy.
    """
    kept = ordinary(local)
    reference = StepReference(float(local[kept].mean()), logarithms[kept].mean(0))
    return StepMoments.of(logarithms[kept], energies[kept], local[kept], reference).step()


def ordinary(local: Tensor) -> Tensor:
    """Return a mask without outliers of the local energy, one of which would outweigh a whole sample."""
    return (local - local.median()).abs() <= _OUTLIERS * local.std() + 1e-9


class StepReference(NamedTuple):
    """Arbitrary origin that is subtracted before squares are summed, so that differences keep their digits.

    Attributes:
        energy: energy, Hartree.
        logarithms: derivatives ``(P,)`` of ln|Psi|.
    """

    energy: float
    logarithms: Tensor


@dataclass(frozen=True)
class StepMoments:
    """Sums over configurations that determine a step; sums of several samples can be added.

    e is the local energy and O are derivatives of ln|Psi|, each less the reference; G are derivatives of the local energy.

    Attributes:
        reference: see :class:`StepReference`.
        count: number of configurations.
        energy: sums of e and of its square.
        first: ``(2, 2 P)``: sums of O and G, and of both times e.
        second: ``(2 P, 2 P)``: sums of their products.
        third: ``(P, P)``: sums of products of O times e.
    """

    reference: StepReference
    count: int
    energy: tuple[float, float]
    first: Tensor
    second: Tensor
    third: Tensor

    @classmethod
    def of(cls, logarithms: Tensor, energies: Tensor, local: Tensor, reference: StepReference) -> StepMoments:
        """Sum over a sample; arguments as of :func:`linear_step`. Configurations on a node are omitted."""
        finite = torch.isfinite(energies).all(1) & torch.isfinite(logarithms).all(1)
        above = local[finite] - reference.energy
        centred = logarithms[finite] - reference.logarithms
        both = torch.cat([centred, energies[finite]], 1)
        return cls(
            reference,
            len(above),
            (float(above.sum()), float(above.square().sum())),
            torch.stack([both.sum(0), above @ both]),
            both.T @ both,
            (centred * above[:, None]).T @ centred,
        )

    def plus(self, other: StepMoments, sign: int = 1) -> StepMoments:
        """Return the sums over both samples or, with the sign -1, those of this sample without a part."""
        return StepMoments(
            self.reference,
            self.count + sign * other.count,
            (self.energy[0] + sign * other.energy[0], self.energy[1] + sign * other.energy[1]),
            self.first + sign * other.first,
            self.second + sign * other.second,
            self.third + sign * other.third,
        )

    def step(self) -> tuple[Tensor, float]:
        """Return the change of the parameters ``(P,)`` and its length.

        Raises:
            ConvergenceError: when no eigenvalue lies near the present energy.
        """
        size = len(self.reference.logarithms)
        above, variance = self.energy[0] / self.count, self.energy[1] / self.count
        energy, variance = self.reference.energy + above, variance - above**2
        mean, with_energy = self.first / self.count
        covariance = self.second / self.count - mean[:, None] * mean
        slopes = with_energy - above * mean  # covariance of the local energy with O and G
        overlap, mixed, changes = covariance[:size, :size], covariance[:size, size:], covariance[size:, size:]
        drift = (
            self.third / self.count - mean[:size, None] * with_energy[:size] - with_energy[:size, None] * mean[:size]
        )
        inner = self.reference.energy * overlap + drift + above * mean[:size, None] * mean[:size] + mixed
        scale = overlap.diagonal().clamp_min(1e-300).sqrt()
        moving = scale > 1e-8  # a parameter that changes nothing stays where it is
        scale = torch.where(moving, scale, torch.ones_like(scale))
        shift = torch.eye(size, dtype=overlap.dtype)
        matrix, metric = (torch.eye(size + 1, dtype=overlap.dtype) for _ in range(2))
        metric[1:, 1:] = overlap / scale / scale[:, None] + _OVERLAP_SHIFT * shift
        matrix[0, 0] = energy
        matrix[1:, 0] = slopes[:size] / scale
        matrix[0, 1:] = (slopes[:size] + mean[size:]) / scale
        matrix[1:, 1:] = inner / scale / scale[:, None] + (energy * _OVERLAP_SHIFT + _ENERGY_SHIFT) * shift
        # Energies depend little on rare configurations such as close pairs; a part of the variance stabilises the function
        # there.
        matrix[0, 0] += VARIANCE_PART * variance
        matrix[0, 1:] += VARIANCE_PART * slopes[size:] / scale
        matrix[1:, 0] += VARIANCE_PART * slopes[size:] / scale
        matrix[1:, 1:] += VARIANCE_PART * changes / scale / scale[:, None]
        still = 1 + (~moving).nonzero()[:, 0]
        matrix[still, :] = 0.0
        matrix[:, still] = 0.0
        matrix[still, still] = energy + 10.0
        return _lowest(matrix, metric, energy, scale)


def _lowest(matrix: Tensor, metric: Tensor, energy: float, scale: Tensor) -> tuple[Tensor, float]:
    """Return the step to the eigenvector that is most similar to the present function."""
    values, vectors = scipy.linalg.eig(matrix.numpy(), metric.numpy())
    near = np.isfinite(values) & (np.abs(values.real - energy) < _FARTHEST) & (np.abs(values.imag) < 1e-6)
    if not near.any():
        raise ConvergenceError(
            f"the linear method finds no eigenvalue within {_FARTHEST:.0f} Hartree of {energy:.4f}: the sample is too small "
            f"for {len(scale)} parameters; use more sweeps"
        )
    vectors = vectors.real / np.linalg.norm(vectors.real, axis=0)
    chosen = max(np.flatnonzero(near), key=lambda index: abs(vectors[0, index]))
    vector = vectors[1:, chosen] / vectors[0, chosen]
    length = float(np.sqrt(vector @ metric[1:, 1:].numpy() @ vector))
    vector *= min(1.0, _LONGEST_STEP / max(length, 1e-300))
    return torch.as_tensor(vector) / scale, min(length, _LONGEST_STEP)
