"""Response of a density to the optimised parameters of its wave function: a last step, and their noise.

Parameters optimised on a finite sample are noisy. Directions along which the energy is flat, such as those that polarise a
molecule, move the density by more than its sampling error, and error bars miss this. The samples of a density outnumber
those of any iteration of the optimiser, so a further step of the linear method is taken on them: its result does not depend, to
first order, on where the optimiser stopped. The density follows to first order,

    d<sum_i b(r_i)> = 2 cov(sum_i b(r_i), d ln|Psi|/dp) . dp,

by a change of its logarithm in the functions b of the fit. The jackknife repeats this for every left-out group of walkers,
together with the fit, so that error bars include both noises and their correlation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError
from ..electronic_structure import CHUNK, Quadrature
from ..wave_function.linear_method import StepMoments, StepReference, ordinary
from ..wave_function.sampling import ElectronSamples, leave_one_out, walker_groups
from ..wave_function.wave_function import SlaterJastrow
from .convex_fit import GridNormaliser
from .linear_log_density import LinearLogDensity

_RIDGE = 1e-6


class ParameterSteps(NamedTuple):
    """Steps of the linear method on samples.

    Attributes:
        steps: steps ``(1 + G, P)`` on all samples, then with one group of walkers left out.
        lengths: lengths ``(1 + G,)`` in the norm of the overlap.
        logarithms: derivatives ``(S, W, P)`` of ln|Psi| less their average, in single precision.
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
        samples: samples of ``wave_function``.
        wave_function: wave function with parameters.
        groups: number of groups of walkers for the jackknife.
        progress: function that receives the number of sweeps done.

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


def with_response(
    density: LinearLogDensity, samples: ElectronSamples, steps: ParameterSteps, grid: Quadrature, spin: str = "total"
) -> LinearLogDensity:
    """Return the density after the step, with the noise of the parameters in its jackknife replicas.

    Args:
        density: density fitted to ``samples``, with as many replicas as ``steps`` has groups.
        samples: samples of the wave function before the step.
        steps: see :func:`parameter_steps`.
        grid: quadrature of the fit.
        spin: spin of the electrons of the density.

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
    normaliser = GridNormaliser(density.base, on_grid, grid)
    covariance = normaliser.moments(density.coefficients[0])[1]
    scale = covariance.diagonal().clamp_min(1e-12).rsqrt()
    matrix = covariance * scale * scale[:, None] + _RIDGE * torch.eye(len(scale), dtype=torch.float64)
    coefficients = density.coefficients + torch.linalg.solve(matrix, (moved * scale).T).T * scale
    shifts = normaliser.shifts(coefficients, density.electrons)
    return LinearLogDensity(
        density.base, density.functions, density.contraction, coefficients, shifts, density.electrons
    )


def _moment_changes(density: LinearLogDensity, samples: ElectronSamples, steps: ParameterSteps, spin: str) -> Tensor:
    """Return the changes ``(1 + G, Q)`` of the averages of the functions, summed over electrons, by the steps."""
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
    counts = leave_one_out(sweeps * torch.bincount(owners, minlength=groups).double())
    means = leave_one_out(logarithms) / counts[:, None], leave_one_out(sums) / counts[:, None]
    covariance = leave_one_out(products) / counts[:, None, None] - torch.einsum("gp,gq->gpq", *means)
    return 2.0 * torch.einsum("gp,gpq->gq", steps.steps, covariance)
