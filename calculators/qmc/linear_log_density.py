"""The linear logarithmic density: a convex fit of scores and likelihood, with jackknife errors.

    ln rho(r) = ln rho_base(r) + sum_k c_k b_k(r)

The gradient of the logarithm of a density is the conditional average of the gradient of ``ln |Psi|^2`` by one electron at that
place, so regressing the one on the other finds the density (H. Cheng et al., J. Chem. Phys. 162, 034120, 2025). The loss
is quadratic in c. Relative weights of regions that touch little come from the likelihood, whose normalisation is integrated
on a grid, where the paper uses noise-contrastive estimation:

    loss = E|score - grad ln rho|^2/2 + lambda (ln Z(c) - E[c . b])

It is convex; Newton's method takes a few iterations. The functions b have zero slope at nuclei, so that the cusps of the
base density, which are exact, stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigurationError, ConvergenceError
from .atomic_functions import AtomicFunctions, Shell
from .densities import CHUNK, DensityModel, LogDensity, OrbitalDensity
from .density_symmetry import allowed_combinations
from .electronic_structure import Quadrature
from .molecule import Molecule
from .sampling import ElectronSamples

_RIDGE = 1e-5
_TOLERANCE = 1e-13  # of the loss; statistical errors make it uncertain by 1e-6 and more
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class DensityFitSettings:
    """How a density is fitted.

    Attributes:
        likelihood: weight lambda of the likelihood, bohr^-2. 0 is score matching alone, large values match moments as plain
            averages over samples do.
        groups: of walkers, for the jackknife.

    Raises:
        ConfigurationError: for negative weights or fewer than four groups.
    """

    likelihood: float = 0.3
    groups: int = 32

    def __post_init__(self) -> None:
        if not self.likelihood >= 0.0 or self.groups < 4:
            raise ConfigurationError(f"likelihood must be 0 or more and groups at least 4, got {self}")


class LinearLogDensity(DensityModel):
    """A base density times the exponential of a linear combination.

    Args:
        base: the density to correct.
        functions: functions on nuclei.
        contraction: ``(K, Q)`` their combinations b.
        coefficients: ``(1 + R, Q)``: the fit, then its jackknife replicas.
        shifts: ``(1 + R,)`` what normalises each of them, added to the logarithm.
        electrons: what each integrates to.
    """

    def __init__(
        self,
        base: OrbitalDensity,
        functions: AtomicFunctions,
        contraction: Tensor,
        coefficients: Tensor,
        shifts: Tensor,
        electrons: float,
    ) -> None:
        self.base, self.functions, self.contraction = base, functions, contraction
        self.coefficients, self.shifts = coefficients, shifts
        self.molecule, self.electrons = base.molecule, electrons
        self.replicas = len(coefficients) - 1
        self._combined = contraction @ coefficients.T  # (K, 1 + R)

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`."""
        base = self.base.evaluate(points, derivatives)
        found = self.functions.evaluate(points, self._combined[:, :1], derivatives)
        return LogDensity(
            base.values + found.values[0] + self.shifts[0],
            base.gradients + found.gradients[:, 0].T if derivatives >= 1 else base.gradients,
            base.laplacians + found.laplacians[0] if derivatives >= 2 else base.laplacians,
        )

    def replica_logs(self, points: Tensor) -> Tensor:
        """See :meth:`DensityModel.replica_logs`."""
        corrections = self.functions.evaluate(points, self._combined[:, 1:]).values
        return self.base.evaluate(points).values + corrections + self.shifts[1:, None]


def correction_functions(molecule: Molecule, grid: Quadrature, density: Tensor) -> tuple[AtomicFunctions, Tensor]:
    """Return the functions on nuclei that correct a logarithmic density, and combinations that its symmetry allows."""
    shells: list[Shell] = []
    for center, number in enumerate(molecule.numbers):
        shells += [Shell(center, 0, "soft_radius", 1.0), Shell(center, 0, "soft_logarithm", 1.0)]
        shells.append(Shell(center, 1, "soft_radius", -1.0))
        exponent = 0.04
        while exponent < 6.0 * number**2:
            shells.append(Shell(center, 0, "gaussian", exponent))
            if exponent < 4.0 * number:
                shells.append(Shell(center, 1, "gaussian", exponent))
            if exponent < 2.0 * number:
                shells.append(Shell(center, 2, "gaussian", exponent))
            exponent *= 2.7
    return AtomicFunctions(molecule.centers, shells), allowed_combinations(molecule.centers, shells, grid, density)


@dataclass(frozen=True)
class _Sums:
    """Averages over one group of walkers: ``M = E[grad b . grad b]``, ``E[grad b . residual]``, ``E[b]``."""

    matrices: Tensor  # (G, Q, Q)
    vectors: Tensor  # (G, Q)
    means: Tensor  # (G, Q)


def fit_linear_log_density(
    samples: ElectronSamples,
    base: OrbitalDensity,
    grid: Quadrature,
    settings: DensityFitSettings | None = None,
    spin: str = "total",
) -> LinearLogDensity:
    """Fit the density of all electrons (``spin="total"``), or of those with spin ``"up"`` or ``"down"``.

    Args:
        samples: configurations with scores.
        base: density to correct, of the same molecule and the same electrons.
        grid: quadrature for the normalisation.
        settings: see :class:`DensityFitSettings`.
        spin: which electrons.

    Raises:
        ConfigurationError: for a base of another molecule, or fewer walkers than groups.
        ConvergenceError: when Newton's method does not converge.
    """
    chosen = settings or DensityFitSettings()
    molecule = samples.molecule
    if not molecule.same_as(base.molecule):
        raise ConfigurationError("the base density belongs to another molecule than the samples")
    walkers = samples.positions.shape[1]
    if walkers < chosen.groups:
        raise ConfigurationError(f"{walkers} walkers cannot be split into {chosen.groups} groups: give fewer groups")
    electrons = {
        "total": slice(0, molecule.electrons),
        "up": slice(0, molecule.spin_up),
        "down": slice(molecule.spin_up, molecule.electrons),
    }[spin]
    log_base = base.log_rho(grid.points)
    functions, contraction = correction_functions(molecule, grid, log_base.exp())
    sums = _group_sums(samples, electrons, base, functions, contraction, chosen.groups)
    on_grid = torch.cat([functions.evaluate(part, contraction).values for part in grid.points.split(CHUNK)], 1)
    count = electrons.stop - electrons.start
    log_weights = log_base + grid.weights.clamp_min(1e-300).log()
    log_weights = torch.where(grid.weights > 0.0, log_weights, torch.full_like(log_weights, -torch.inf))
    return _solved(sums, on_grid, log_weights, chosen, base, functions, contraction, float(count))


def _group_sums(
    samples: ElectronSamples,
    electrons: slice,
    base: OrbitalDensity,
    functions: AtomicFunctions,
    contraction: Tensor,
    groups: int,
) -> _Sums:
    size = contraction.shape[1]
    sums = _Sums(
        torch.zeros(groups, size, size, dtype=torch.float64),
        torch.zeros(groups, size, dtype=torch.float64),
        torch.zeros(groups, size, dtype=torch.float64),
    )
    walkers = torch.arange(samples.positions.shape[1]) * groups // samples.positions.shape[1]
    for group in range(groups):
        members = walkers == group
        points = samples.positions[:, members, electrons].reshape(-1, 3)
        scores = samples.scores[:, members, electrons].reshape(-1, 3)
        for part, score in zip(points.split(CHUNK), scores.split(CHUNK), strict=True):
            found = functions.evaluate(part, contraction, 1)
            residual = score - base.evaluate(part, 1).gradients
            for axis in range(3):
                sums.matrices[group] += found.gradients[axis] @ found.gradients[axis].T
                sums.vectors[group] += found.gradients[axis] @ residual[:, axis]
            sums.means[group] += found.values.sum(1)
        for total in (sums.matrices, sums.vectors, sums.means):
            total[group] /= len(points)
    return sums


def _solved(
    sums: _Sums,
    on_grid: Tensor,
    log_weights: Tensor,
    settings: DensityFitSettings,
    base: OrbitalDensity,
    functions: AtomicFunctions,
    contraction: Tensor,
    electrons: float,
) -> LinearLogDensity:
    """Solve for all groups together, then with one group left out at a time."""
    groups = len(sums.means)
    scale = sums.matrices.mean(0).diagonal().clamp_min(1e-12).rsqrt()
    on_grid = on_grid * scale[:, None]
    ridge = _RIDGE * torch.eye(len(scale), dtype=torch.float64)

    def problem(left_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        kept = [g for g in range(groups) if g != left_out]
        matrix = sums.matrices[kept].mean(0) * scale * scale[:, None] + ridge
        return matrix, sums.vectors[kept].mean(0) * scale, sums.means[kept].mean(0) * scale

    matrix, vector, mean = problem(None)
    weight = settings.likelihood

    def loss(at: Tensor) -> float:
        return float(0.5 * at @ matrix @ at - vector @ at + weight * (_log_total(on_grid, log_weights, at) - mean @ at))

    solution = torch.zeros_like(vector)
    for _ in range(_NEWTON_STEPS):
        gradient, covariance, _ = _likelihood(on_grid, log_weights, solution)
        slope = matrix @ solution - vector + weight * (gradient - mean)
        step = torch.linalg.solve(matrix + weight * covariance, slope)
        decrement = float(slope @ step)  # twice what the loss can still fall
        if decrement < _TOLERANCE:
            break
        length, here = 1.0, loss(solution)
        while length > 1e-6 and loss(solution - length * step) > here - 0.1 * length * decrement:
            length *= 0.5
        solution = solution - length * step
    else:
        raise ConvergenceError(
            "the fit of the density did not converge: the samples do not fit the base density. Check that they belong to it"
        )
    _, covariance, _ = _likelihood(on_grid, log_weights, solution)
    solutions = [solution]
    for group in range(groups):
        matrix, vector, mean = problem(group)
        inverse = torch.linalg.inv(matrix + settings.likelihood * covariance)
        replica = solution.clone()
        for _ in range(4 if settings.likelihood else 1):
            gradient = _likelihood(on_grid, log_weights, replica, False)[0] if settings.likelihood else mean
            replica = replica - inverse @ (matrix @ replica - vector + settings.likelihood * (gradient - mean))
        solutions.append(replica)
    coefficients = torch.stack(solutions)
    shifts = torch.stack(
        [torch.tensor(electrons).log() - torch.logsumexp(log_weights + c @ on_grid, 0) for c in solutions]
    )
    return LinearLogDensity(base, functions, contraction, coefficients * scale, shifts, electrons)


def _log_total(on_grid: Tensor, log_weights: Tensor, solution: Tensor) -> Tensor:
    """Return ``ln Z``."""
    return torch.logsumexp(log_weights + solution @ on_grid, 0)


def _likelihood(
    on_grid: Tensor, log_weights: Tensor, solution: Tensor, curvature: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradient ``(Q,)`` and Hessian ``(Q, Q)`` of ``ln Z``, and ``ln Z``."""
    exponents = log_weights + solution @ on_grid
    log_total = torch.logsumexp(exponents, 0)
    probabilities = (exponents - log_total).exp()
    mean = on_grid @ probabilities
    covariance = (on_grid * probabilities) @ on_grid.T - mean[:, None] * mean if curvature else on_grid.new_empty(0)
    return mean, covariance, log_total
