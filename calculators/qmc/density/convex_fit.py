"""Corrections to a logarithmic density by a convex fit of scores and likelihood, with jackknife errors.

    ln rho(r) = ln rho_base(r) + sum_k c_k b_k(r)

The gradient of the logarithm of a density is the conditional average of the gradient of ``ln |Psi|^2`` by one electron at that
place, so regressing the score on the gradient of ln rho gives the density (H. Cheng et al., J. Chem. Phys. 162, 034120, 2025).
The loss is quadratic in c. The likelihood, normalised on a grid, fixes the relative weights of regions with little overlap, for
which the paper uses noise-contrastive estimation:

    loss = E|score - grad ln rho|^2/2 + lambda E|score|^2 (ln Z(c) - E[c . b])

It is convex; Newton's method takes a few iterations, and a few more for each jackknife replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError, ConvergenceError
from ..electronic_structure import CHUNK, Quadrature
from ..wave_function.sampling import ElectronSamples, leave_one_out, walker_groups
from .densities import DensityModel

_RIDGE = 1e-5
_TOLERANCE = 1e-13  # of the loss; statistical errors make it uncertain by 1e-6 and more
_NEWTON_STEPS = 50

Corrections = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The functions b: values ``(Q, P)`` at points ``(P, 3)``, and for one derivative gradients ``(3, Q, P)``."""


@dataclass(frozen=True)
class DensityFitSettings:
    """Settings of the fit of a density.

    Attributes:
        likelihood: weight lambda of the likelihood. 0 is score matching alone; values of 1 and more match moments as plain
            averages over samples do.
        groups: number of groups of walkers for the jackknife.

    Raises:
        ConfigurationError: for negative weights or fewer than four groups.
    """

    likelihood: float = 0.05
    groups: int = 32

    def __post_init__(self) -> None:
        if not self.likelihood >= 0.0 or self.groups < 4:
            raise ConfigurationError(f"likelihood must be 0 or more and groups at least 4, got {self}")


class ConvexFit(NamedTuple):
    """The fit to all walkers, and the fits with one group of walkers left out.

    Attributes:
        coefficients: coefficients c ``(1 + G, Q)``.
        shifts: shifts ``(1 + G,)`` that normalise ``base + c . b + shift`` to the number of electrons.
    """

    coefficients: Tensor
    shifts: Tensor


def convex_fit(
    samples: ElectronSamples,
    electrons: slice,
    base: DensityModel,
    corrections: Corrections,
    grid: Quadrature,
    settings: DensityFitSettings,
) -> ConvexFit:
    """Fit corrections to a base density, which need not be normalised.

    Args:
        samples: configurations with scores.
        electrons: electrons of the density.
        base: density to correct.
        corrections: see :data:`Corrections`.
        grid: quadrature for the normalisation.
        settings: see :class:`DensityFitSettings`.

    Raises:
        ConfigurationError: for fewer walkers than groups.
        ConvergenceError: when Newton's method does not converge.
    """
    walkers = samples.positions.shape[1]
    if walkers < settings.groups:
        raise ConfigurationError(f"{walkers} walkers cannot be split into {settings.groups} groups: give fewer groups")
    averages = _averages(samples, electrons, base, corrections, settings.groups)
    on_grid = torch.cat([corrections(part, 0)[0] for part in grid.points.split(CHUNK)], 1)
    scale = averages.matrices[0].diagonal().clamp_min(1e-12).rsqrt()
    # Scores are as large as the cores are deep, and the likelihood must keep up with them.
    weight = settings.likelihood * float(samples.scores[:, :, electrons].square().sum(3).mean())
    normaliser = GridNormaliser(base, on_grid * scale[:, None], grid)
    ridge = _RIDGE * torch.eye(len(scale), dtype=torch.float64)
    scaled = _Averages(
        averages.matrices * scale * scale[:, None] + ridge, averages.vectors * scale, averages.means * scale
    )
    solutions = _solutions(scaled, normaliser, weight)
    shifts = normaliser.shifts(solutions, electrons.stop - electrons.start)
    return ConvexFit(solutions * scale, shifts)


class GridNormaliser:
    """``ln Z(c)`` of a base density times ``exp(c . b)``, and averages of the functions b, by quadrature.

    Args:
        base: base density.
        functions: the functions b ``(Q, P)`` on the grid.
        grid: quadrature.
    """

    def __init__(self, base: DensityModel, functions: Tensor, grid: Quadrature) -> None:
        log_weights = base.log_rho(grid.points) + grid.weights.clamp_min(1e-300).log()
        self._log_weights = torch.where(grid.weights > 0.0, log_weights, torch.full_like(log_weights, -torch.inf))
        self._functions = functions

    def log_total(self, at: Tensor) -> Tensor:
        """Return ``ln Z``."""
        return torch.logsumexp(self._log_weights + at @ self._functions, 0)

    def shifts(self, coefficients: Tensor, electrons: float) -> Tensor:
        """Return the shifts ``(R,)`` that normalise the densities with ``coefficients`` ``(R, Q)``."""
        logarithm = torch.tensor(float(electrons), dtype=torch.float64).log()
        return torch.stack([logarithm - self.log_total(one) for one in coefficients])

    def moments(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean ``(Q,)`` and covariance ``(Q, Q)`` of the functions."""
        probabilities = torch.softmax(self._log_weights + at @ self._functions, 0)
        mean = self._functions @ probabilities
        return mean, (self._functions * probabilities) @ self._functions.T - mean[:, None] * mean


class _Averages(NamedTuple):
    """``M = E[grad b . grad b]``, ``E[grad b . residual]``, ``E[b]``: of all walkers, then with one group left out."""

    matrices: Tensor  # (1 + G, Q, Q)
    vectors: Tensor  # (1 + G, Q)
    means: Tensor  # (1 + G, Q)


def _averages(
    samples: ElectronSamples, electrons: slice, base: DensityModel, corrections: Corrections, groups: int
) -> _Averages:
    found: list[tuple[Tensor, ...]] = []
    owners = walker_groups(samples.positions.shape[1], groups)
    for group in range(groups):
        members = owners == group
        points = samples.positions[:, members, electrons].reshape(-1, 3)
        scores = samples.scores[:, members, electrons].reshape(-1, 3)
        sums: list[Tensor | float] = [0.0, 0.0, 0.0]
        for part, score in zip(points.split(CHUNK), scores.split(CHUNK), strict=True):
            values, gradients = corrections(part, 1)
            residual = score - base.evaluate(part, 1).gradients
            slopes = gradients.transpose(0, 1).flatten(1)  # (Q, 3 P)
            for index, term in enumerate((slopes @ slopes.T, slopes @ residual.T.flatten(), values.sum(1))):
                sums[index] = sums[index] + term
        found.append(tuple(torch.as_tensor(total) / len(points) for total in sums))
    counts = leave_one_out(torch.ones(groups, dtype=torch.float64))
    matrices, vectors, means = (leave_one_out(torch.stack(part)) for part in zip(*found, strict=True))
    return _Averages(matrices / counts[:, None, None], vectors / counts[:, None], means / counts[:, None])


def _solutions(averages: _Averages, normaliser: GridNormaliser, likelihood: float) -> Tensor:
    """Return the solution for all walkers and those with one group left out, ``(1 + G, Q)``, which start from it."""
    matrix, vector, mean = (part[0] for part in averages)
    solution = _solved(matrix, vector, mean, normaliser, likelihood)
    curvature = normaliser.moments(solution)[1]  # for all replicas, whose solutions are close
    found = [solution]
    for matrix, vector, mean in zip(*(part[1:] for part in averages), strict=True):
        inverse = torch.linalg.inv(matrix + likelihood * curvature)
        replica = solution.clone()
        for _ in range(4 if likelihood else 1):
            pull = normaliser.moments(replica)[0] - mean if likelihood else 0.0
            replica = replica - inverse @ (matrix @ replica - vector + likelihood * pull)
        found.append(replica)
    return torch.stack(found)


def _solved(matrix: Tensor, vector: Tensor, mean: Tensor, normaliser: GridNormaliser, weight: float) -> Tensor:
    def loss(at: Tensor) -> float:
        return float(0.5 * at @ matrix @ at - vector @ at + weight * (normaliser.log_total(at) - mean @ at))

    solution = torch.zeros_like(vector)
    for _ in range(_NEWTON_STEPS):
        average, covariance = normaliser.moments(solution)
        slope = matrix @ solution - vector + weight * (average - mean)
        step = torch.linalg.solve(matrix + weight * covariance, slope)
        decrement = float(slope @ step)  # twice what the loss can still fall
        if decrement < _TOLERANCE:
            return solution
        length, here = 1.0, loss(solution)
        while length > 1e-6 and loss(solution - length * step) > here - 0.1 * length * decrement:
            length *= 0.5
        solution = solution - length * step
    raise ConvergenceError(
        "the fit of the density did not converge: the samples do not fit the base density. Check that they belong to it"
    )
