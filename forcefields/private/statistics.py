"""Private statistics for standardising inputs: means, spreads, principal axes. Each is a release, and goes on the ledger.

All are sums over units of vectors clipped to a norm, with Gaussian noise, without sampling (rate 1). A unit contributes the
mean over its samples. Adding or removing a unit moves the sum by the norm at most; replacing it, by twice that, which
the ledger counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .budget import Release
from .learning.clipping import clipped_sum
from .noise import noise_source
from .units import UnitData, draw_units, mean_by_unit

_LEAST_SHARE = 1e-4


class Moments(NamedTuple):
    """Noisy means and deviations ``(d,)`` of the inputs, and what they cost."""

    mean: Tensor
    deviation: Tensor
    release: Release


class PrincipalAxes(NamedTuple):
    """Axes ``(d, k)``, orthonormal, in the order of their noisy variances, and what they cost."""

    axes: Tensor
    release: Release


def private_moments(
    data: UnitData, centre: Tensor, radius: float, noise_multiplier: float, *, seed: int | None = None
) -> Moments:
    """Return means and deviations of inputs ``(S, d)``, from one answer of sums and sums of squares.

    With ``x = (input - centre) / radius`` clipped to norm 1 for each sample, a unit contributes the means of x and of x^2, of
    norm 1 each at most (``sum x_i^4 <= (sum x_i^2)^2``), so of norm sqrt(2) together: the noise on each number is
    ``noise_multiplier * sqrt(2)``. The number of units is public.

    Args:
        data: data with the inputs.
        centre: ``(d,)``, a public guess of the mean.
        radius: public; inputs further from the centre are drawn in to that distance, which biases the result.
        noise_multiplier: as in :class:`~flowbridge.forcefields.private.budget.Release`.
        seed: None for cryptographic noise.

    Raises:
        ConfigurationError: for impossible numbers.
    """
    _refuse(data, noise_multiplier)
    if not radius > 0.0 or centre.shape != data.inputs.shape[1:]:
        raise ConfigurationError(
            f"radius must be positive and centre of shape {tuple(data.inputs.shape[1:])}, got {radius} and "
            f"{tuple(centre.shape)}"
        )
    noise = noise_source(seed, "moments")
    batch = data.batch(draw_units(data.units, 1.0, noise))
    x = (batch.inputs.double() - centre.double()) / radius
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1.0)
    sensitivity = 2.0**0.5
    total, _, _ = clipped_sum(mean_by_unit(torch.cat([x, x.square()], dim=1), batch), sensitivity)
    noisy = (total + noise_multiplier * sensitivity * noise.normal(total.shape)) / data.units
    first, second = noisy.chunk(2)
    # Noise can make a variance negative: no deviation is below that of the noise itself.
    floor = noise_multiplier * sensitivity / data.units
    deviation = (second - first.square()).clamp_min(max(floor, _LEAST_SHARE**2)).sqrt()
    release = Release(
        mechanism="means and second moments", noise_multiplier=noise_multiplier, sampling_rate=1.0, steps=1,
        clipping={"radius": radius, "norm": sensitivity}, noise=noise.kind,
    )  # fmt: skip
    return Moments(centre.double() + radius * first, radius * deviation, release)


def private_principal_axes(
    data: UnitData, axes: int, noise_multiplier: float, *, centre: Tensor | None = None, seed: int | None = None
) -> PrincipalAxes:
    """Return principal axes by DP-PCA (Dwork, Talwar, Thakurta and Zhang, STOC 2014): those of a noisy second-moment matrix.

    Each sample, minus the centre, is scaled to norm 1; a unit contributes the mean of ``x x^T``, of Frobenius norm 1 at most.
    Noise is symmetric: as the upper triangle determines the matrix and a vector of it is no longer than the matrix, noise of
    ``noise_multiplier`` on each of its entries is enough.

    Args:
        data: data with the inputs ``(S, d)``.
        axes: number of axes.
        noise_multiplier: as in :class:`~flowbridge.forcefields.private.budget.Release`.
        centre: ``(d,)``, public or from :func:`private_moments`; zero by default.
        seed: None for cryptographic noise.

    Raises:
        ConfigurationError: for impossible numbers.
    """
    _refuse(data, noise_multiplier)
    length = data.inputs.shape[1]
    if not 1 <= axes <= length:
        raise ConfigurationError(f"axes must be from 1 to the {length} inputs, got {axes}")
    noise = noise_source(seed, "axes")
    batch = data.batch(draw_units(data.units, 1.0, noise))
    x = batch.inputs.double() - (0.0 if centre is None else centre.double())
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    # A mean of matrices of norm 1 has norm 1 at most, so nothing is left to clip, and no matrix of one sample is ever formed.
    share = 1.0 / torch.bincount(batch.owners, minlength=batch.units).double()[batch.owners]
    total = x.T @ (share[:, None] * x)
    upper = torch.triu(noise_multiplier * noise.normal(total.shape))
    _, vectors = torch.linalg.eigh(total + upper + torch.triu(upper, 1).T)
    release = Release(
        mechanism="principal axes", noise_multiplier=noise_multiplier, sampling_rate=1.0, steps=1,
        clipping={"norm": 1.0}, noise=noise.kind,
    )  # fmt: skip
    return PrincipalAxes(vectors.flip(1)[:, :axes].contiguous(), release)


def _refuse(data: UnitData, noise_multiplier: float) -> None:
    if data.inputs.dim() != 2:
        raise ConfigurationError(f"statistics are taken of inputs (S, d), got shape {tuple(data.inputs.shape)}")
    if not noise_multiplier > 0.0:
        raise ConfigurationError(f"noise_multiplier must be positive, got {noise_multiplier}")
