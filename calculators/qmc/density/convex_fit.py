"""Corrections to a logarithmic density by a convex fit of scores and likelihood, with jackknife errors.

    ln rho(r) = ln rho_base(r) + sum_k c_k b_k(r)

The gradient of the logarithm of a density is the conditional average of the gradient of ``ln |Psi|^2`` by one electron at that
place, so regressing the one on the other finds the density (H. Cheng et al., J. Chem. Phys. 162, 034120, 2025). The loss
is quadratic in c. Relative weights of regions that touch little come from the likelihood, whose normalisation is integrated
on a grid, where the paper uses noise-contrastive estimation:

    loss = E|score - grad ln rho|^2/2 + lambda E|score|^2 (ln Z(c) - E[c . b])

It is convex; Newton's method takes a few iterations, and a few more for each group of walkers that the jackknife leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError, ConvergenceError
from ..electronic_structure import Quadrature
from ..wave_function.sampling import ElectronSamples
from .densities import CHUNK, DensityModel

_RIDGE = 1e-5
_TOLERANCE = 1e-13  # of the loss; statistical errors make it uncertain by 1e-6 and more
_NEWTON_STEPS = 50

Corrections = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The functions b: values ``(Q, P)`` at points ``(P, 3)``, and for one derivative gradients ``(3, Q, P)``."""


@dataclass(frozen=True)
class DensityFitSettings:
    """How a density is fitted.

    Attributes:
        likelihood: weight lambda of the likelihood. 0 is score matching alone, values of 1 and more match moments as plain
            averages over samples do.
        groups: of walkers, for the jackknife.

    Raises:
        ConfigurationError: for negative weights or fewer than four groups.
    """

    likelihood: float = 0.05
    groups: int = 32

    def __post_init__(self) -> None:
        if not self.likelihood >= 0.0 or self.groups < 4:
            raise ConfigurationError(f"likelihood must be 0 or more and groups at least 4, got {self}")


class ConvexFit(NamedTuple):
    """What was fitted, and with one group of walkers left out at a time.

    Attributes:
        coefficients: ``(1 + G, Q)``.
        shifts: ``(1 + G,)`` that make ``base + c . b + shift`` the logarithm of a density with the electrons' number.
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
        electrons: those whose density it is.
        base: what to correct.
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
    sums = _group_sums(samples, electrons, base, corrections, settings.groups)
    on_grid = torch.cat([corrections(part, 0)[0] for part in grid.points.split(CHUNK)], 1)
    log_weights = base.log_rho(grid.points) + grid.weights.clamp_min(1e-300).log()
    log_weights = torch.where(grid.weights > 0.0, log_weights, torch.full_like(log_weights, -torch.inf))
    scale = sums.matrices.mean(0).diagonal().clamp_min(1e-12).rsqrt()
    # Scores are as large as the cores are deep, and the likelihood must keep up with them.
    weight = settings.likelihood * float(samples.scores[:, :, electrons].square().sum(3).mean())
    problem = _Problem(sums.scaled(scale), on_grid * scale[:, None], log_weights, weight)
    solutions = torch.stack([problem.solution, *problem.replicas()])
    logarithm = torch.tensor(float(electrons.stop - electrons.start), dtype=torch.float64).log()
    shifts = torch.stack([logarithm - problem.log_total(solution) for solution in solutions])
    return ConvexFit(solutions * scale, shifts)


@dataclass(frozen=True)
class _Sums:
    """Averages over one group of walkers: ``M = E[grad b . grad b]``, ``E[grad b . residual]``, ``E[b]``."""

    matrices: Tensor  # (G, Q, Q)
    vectors: Tensor  # (G, Q)
    means: Tensor  # (G, Q)

    def scaled(self, scale: Tensor) -> _Sums:
        return _Sums(self.matrices * scale * scale[:, None], self.vectors * scale, self.means * scale)

    def averages(self, left_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return matrix, vector and mean of all groups but one."""
        kept = [group for group in range(len(self.means)) if group != left_out]
        ridge = _RIDGE * torch.eye(self.means.shape[1], dtype=torch.float64)
        return self.matrices[kept].mean(0) + ridge, self.vectors[kept].mean(0), self.means[kept].mean(0)


def _group_sums(
    samples: ElectronSamples, electrons: slice, base: DensityModel, corrections: Corrections, groups: int
) -> _Sums:
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    walkers = torch.arange(samples.positions.shape[1]) * groups // samples.positions.shape[1]
    for group in range(groups):
        members = walkers == group
        points = samples.positions[:, members, electrons].reshape(-1, 3)
        scores = samples.scores[:, members, electrons].reshape(-1, 3)
        sums: list[Tensor | float] = [0.0, 0.0, 0.0]
        for part, score in zip(points.split(CHUNK), scores.split(CHUNK), strict=True):
            values, gradients = corrections(part, 1)
            residual = score - base.evaluate(part, 1).gradients
            slopes = gradients.transpose(0, 1).flatten(1)  # (Q, 3 P)
            for index, term in enumerate((slopes @ slopes.T, slopes @ residual.T.flatten(), values.sum(1))):
                sums[index] = sums[index] + term
        found.append(tuple(torch.as_tensor(total) / len(points) for total in sums))  # type: ignore[arg-type]
    matrices, vectors, means = zip(*found, strict=True)
    return _Sums(torch.stack(matrices), torch.stack(vectors), torch.stack(means))


class _Problem:
    """The convex problem of all groups, solved, and those with one group left out, which start from its solution."""

    def __init__(self, sums: _Sums, on_grid: Tensor, log_weights: Tensor, likelihood: float) -> None:
        self._sums, self._on_grid, self._log_weights, self._likelihood = sums, on_grid, log_weights, likelihood
        self.solution = self._solved()

    def log_total(self, at: Tensor) -> Tensor:
        """Return ``ln Z``."""
        return torch.logsumexp(self._log_weights + at @ self._on_grid, 0)

    def replicas(self) -> list[Tensor]:
        """Return the solutions with one group left out; the curvature of the likelihood is that at the common solution."""
        probabilities = self._probabilities(self.solution)
        curvature = self._covariance(probabilities)
        found = []
        for group in range(len(self._sums.means)):
            matrix, vector, mean = self._sums.averages(group)
            inverse = torch.linalg.inv(matrix + self._likelihood * curvature)
            replica = self.solution.clone()
            for _ in range(4 if self._likelihood else 1):
                pull = self._on_grid @ self._probabilities(replica) - mean if self._likelihood else 0.0
                replica = replica - inverse @ (matrix @ replica - vector + self._likelihood * pull)
            found.append(replica)
        return found

    def _solved(self) -> Tensor:
        matrix, vector, mean = self._sums.averages(None)
        weight = self._likelihood

        def loss(at: Tensor) -> float:
            return float(0.5 * at @ matrix @ at - vector @ at + weight * (self.log_total(at) - mean @ at))

        solution = torch.zeros_like(vector)
        for _ in range(_NEWTON_STEPS):
            probabilities = self._probabilities(solution)
            slope = matrix @ solution - vector + weight * (self._on_grid @ probabilities - mean)
            step = torch.linalg.solve(matrix + weight * self._covariance(probabilities), slope)
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

    def _probabilities(self, at: Tensor) -> Tensor:
        return torch.softmax(self._log_weights + at @ self._on_grid, 0)

    def _covariance(self, probabilities: Tensor) -> Tensor:
        mean = self._on_grid @ probabilities
        return (self._on_grid * probabilities) @ self._on_grid.T - mean[:, None] * mean
