"""How a density depends on the optimised parameters of its wave function: a last step, and the noise of all of them.

Parameters optimised on a finite sample are noisy. Directions along which the energy is flat, such as those that polarise a
molecule, move the density by more than the samples that measure it say, and no error bar knows of it. The samples of a
density are more than the optimiser had in any iteration, and a further step of the linear method can be taken on them: what
they say of the parameters does not depend, to first order, on where the optimiser stopped. The density follows to first order,

    d<sum_i b(r_i)> = 2 cov(sum_i b(r_i), d ln|Psi|/dp) . dp,

by a change of its logarithm in the same functions b that it was fitted with. The jackknife does so for every group of
walkers left out, in step with the fit, so that error bars hold both noises and their correlation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError
from ..electronic_structure import Quadrature
from ..wave_function.linear_method import StepMoments, StepReference, ordinary
from ..wave_function.sampling import ElectronSamples
from ..wave_function.wave_function import SlaterJastrow
from .densities import CHUNK
from .linear_log_density import LinearLogDensity

_RIDGE = 1e-6


class ParameterSteps(NamedTuple):
    """Steps of the linear method on samples.

    Attributes:
        steps: ``(1 + G, P)``: on all of them, and with one group of walkers left out at a time.
        lengths: ``(1 + G,)`` in the norm of the overlap.
        logarithms: ``(S, W, P)`` derivatives of ln|Psi| less their average, in single precision.
    """

    steps: Tensor
    lengths: Tensor
    logarithms: Tensor


def parameter_steps(
    samples: ElectronSamples,
    wave_function: SlaterJastrow,
    groups: int,
    progress: Callable[[int], Any] | None = None,
) -> ParameterSteps:
    """Take a step of the linear method on samples of ``wave_function``.

    Args:
        samples: its configurations.
        wave_function: with parameters.
        groups: of walkers, for the jackknife.
        progress: called with the number of sweeps done.

    Raises:
        ConfigurationError: for a function without parameters, or fewer walkers than groups.
        ConvergenceError: when the samples are too few for the parameters.
    """
    sweeps, walkers = samples.kinetic.shape
    count = sum(wave_function.parameter_counts)
    if count == 0 or walkers < groups:
        raise ConfigurationError(
            f"a step needs parameters and as many walkers as groups, got {count} parameters, {walkers} walkers, {groups} groups"
        )
    local = samples.local_energy
    kept = ordinary(local.flatten()).reshape(local.shape)
    owners = walker_groups(walkers, groups)
    logarithms = torch.empty(sweeps, walkers, count, dtype=torch.float32)
    parts: list[StepMoments | None] = [None] * groups
    reference: StepReference | None = None
    for sweep in range(sweeps):
        found = wave_function.parameter_derivatives(samples.positions[sweep])
        if reference is None:
            reference = StepReference(float(local[kept].mean()), found.logarithms.nanmean(0))
        logarithms[sweep] = found.logarithms - reference.logarithms
        for group in range(groups):
            chosen = (owners == group) & kept[sweep]
            part = StepMoments.of(
                found.logarithms[chosen], found.energies[chosen], found.local_energy[chosen], reference
            )
            before = parts[group]
            parts[group] = part if before is None else before.plus(part)
        if progress is not None:
            progress(sweep + 1)
    moments = [part for part in parts if part is not None]
    total = moments[0]
    for part in moments[1:]:
        total = total.plus(part)
    steps, lengths = zip(total.step(), *(total.plus(part, -1).step() for part in moments), strict=True)
    return ParameterSteps(torch.stack(steps), torch.tensor(lengths), logarithms - logarithms.mean((0, 1)))


def walker_groups(walkers: int, groups: int) -> Tensor:
    """Return for each walker the group ``(W,)`` that it belongs to in a jackknife."""
    return torch.arange(walkers) * groups // walkers


def with_response(
    density: LinearLogDensity, samples: ElectronSamples, steps: ParameterSteps, grid: Quadrature, spin: str = "total"
) -> LinearLogDensity:
    """Return the density after the step, with the noise of the parameters in its jackknife replicas.

    Args:
        density: fitted to ``samples`` with as many replicas as ``steps`` has groups.
        samples: of the wave function before the step.
        steps: see :func:`parameter_steps`.
        grid: quadrature that the density was fitted with.
        spin: of the electrons whose density it is.

    Raises:
        ConfigurationError: when the numbers of groups differ.
    """
    groups = len(steps.steps) - 1
    if density.replicas != groups:
        raise ConfigurationError(f"the density has {density.replicas} replicas, and the steps have {groups}")
    moved = _moment_changes(density, samples, steps, spin) / density.electrons
    on_grid = torch.cat(
        [density.functions.evaluate(part, density.contraction).values for part in grid.points.split(CHUNK)], 1
    )
    log_weights = density.base.log_rho(grid.points) + grid.weights.clamp_min(1e-300).log()
    log_weights = torch.where(grid.weights > 0.0, log_weights, torch.full_like(log_weights, -torch.inf))
    shares = torch.softmax(log_weights + density.coefficients[0] @ on_grid, 0)
    mean = on_grid @ shares
    covariance = (on_grid * shares) @ on_grid.T - mean[:, None] * mean
    scale = covariance.diagonal().clamp_min(1e-12).rsqrt()
    matrix = covariance * scale * scale[:, None] + _RIDGE * torch.eye(len(scale), dtype=torch.float64)
    changes = torch.linalg.solve(matrix, (moved * scale).T).T * scale
    coefficients = density.coefficients + changes
    logarithm = torch.tensor(density.electrons, dtype=torch.float64).log()
    shifts = torch.stack([logarithm - torch.logsumexp(log_weights + c @ on_grid, 0) for c in coefficients])
    return LinearLogDensity(
        density.base, density.functions, density.contraction, coefficients, shifts, density.electrons
    )


def _moment_changes(density: LinearLogDensity, samples: ElectronSamples, steps: ParameterSteps, spin: str) -> Tensor:
    """Return ``(1 + G, Q)``: how the steps change the averages of the functions, summed over electrons."""
    groups = len(steps.steps) - 1
    sweeps, walkers = samples.kinetic.shape
    owners = walker_groups(walkers, groups)
    electrons = samples.electrons_of(spin)
    size = density.contraction.shape[1]
    logarithms, sums = torch.zeros(groups, steps.steps.shape[1]).double(), torch.zeros(groups, size).double()
    products = torch.zeros(groups, steps.steps.shape[1], size, dtype=torch.float64)
    for sweep in range(sweeps):
        points = samples.positions[sweep, :, electrons].reshape(-1, 3)
        values = torch.cat(
            [density.functions.evaluate(part, density.contraction).values for part in points.split(CHUNK)], 1
        )
        values = values.reshape(size, walkers, -1).sum(2).T
        derivatives = steps.logarithms[sweep].double()
        logarithms.index_add_(0, owners, derivatives)
        sums.index_add_(0, owners, values)
        for group in range(groups):
            chosen = owners == group
            products[group] += derivatives[chosen].T @ values[chosen]
    members = sweeps * torch.bincount(owners, minlength=groups).double()
    changes = []
    for left_out in (None, *range(groups)):
        kept = [group for group in range(groups) if group != left_out]
        count = members[kept].sum()
        covariance = products[kept].sum(0) / count
        covariance = covariance - torch.outer(logarithms[kept].sum(0), sums[kept].sum(0)) / count**2
        changes.append(2.0 * steps.steps[0 if left_out is None else left_out + 1] @ covariance)
    return torch.stack(changes)
