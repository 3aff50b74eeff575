"""The asymmetric double well of arXiv 2002.06707: data, flows, and the error of free energies along its slow coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowbridge.core.statistics.estimates import effective_sample_percent
from flowbridge.flows.stochastic.distributions import ReducedEnergy, StandardNormal
from flowbridge.flows.stochastic.kernels import Kernel
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow
from flowbridge.flows.transforms.bijection import Bijection, ElementwiseTransform
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.sinh_arcsinh import Affine
from flowbridge.flows.transforms.splines import RationalQuadraticSpline

BINS = 30
RANGE = 2.25
_STEP, _KERNEL_STEPS = 0.25, 20
_BLOCKS, _HIDDEN = 3, (64, 64)
_SPLINE = (20, 4.0)
_WALKERS = 50  # in each well

KINDS = ("NSF", "NSF + MC", "RNVP", "RNVP + MC", "RNVP + MC, learned step")


def double_well(x: Tensor) -> Tensor:
    """Return ``-x1/2 - 6 x1^2 + x1^4 + x2^2/2`` ``(B,)``: wells at -1.71 and 1.75 with 1.7 kT between them, 8 kT up."""
    first = x[:, 0].square()
    return -0.5 * x[:, 0] - 6.0 * first + first.square() + 0.5 * x[:, 1].square()


def brute_force_data(seed: int, steps: int = 100_000) -> Tensor:
    """Return every 10th of ``steps`` Metropolis steps, half of them in each well, ``(steps / 10, 2)``.

    Fifty walkers start in each well and hardly ever cross: the populations of the data are those of the starts, one half each,
    and not those of the energy, as of data that dynamics gives within its time.
    """
    generator = torch.Generator().manual_seed(seed)
    position = torch.tensor([[-1.8, 0.0], [1.8, 0.0]]).repeat(_WALKERS, 1)
    energy, kept = double_well(position), []
    for step in range(steps // len(position)):
        proposed = position + _STEP * torch.randn(position.shape, generator=generator)
        new = double_well(proposed)
        taken = torch.rand(len(position), generator=generator).log() < energy - new
        position = torch.where(taken.unsqueeze(1), proposed, position)
        energy = torch.where(taken, new, energy)
        if step % 10 == 9:
            kept.append(position)
    return torch.cat(kept)


def make_flow(kind: str, seed: int) -> StochasticFlow:
    """Return an untrained flow of one of ``KINDS``: three blocks of two couplings, kernels after each block or none."""
    spline, learned = kind.startswith("NSF"), "learned" in kind
    return plane_flow(
        double_well, _BLOCKS, seed, lambda: RationalQuadraticSpline(*_SPLINE) if spline else Affine(),
        (lambda: MetropolisKernel(_STEP, _KERNEL_STEPS, learned=learned)) if "MC" in kind else None,
    )  # fmt: skip


def plane_flow(
    energy: ReducedEnergy,
    blocks: int,
    seed: int,
    transform: Callable[[], ElementwiseTransform],
    kernel: Callable[[], Kernel] | None,
) -> StochasticFlow:
    """Return an untrained flow in the plane: blocks of two couplings, each followed by a kernel, or by none."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[Bijection | Kernel] = []
    for _ in range(blocks):
        steps += [Coupling(2, [moved], transform(), _HIDDEN, generator) for moved in (0, 1)]
        steps += [] if kernel is None else [kernel()]
    return StochasticFlow(StandardNormal(2), energy, steps)


def reference_profile() -> Tensor:
    """Return the free energy of each bin ``(BINS,)`` in kT, by quadrature, with mean zero."""
    points = torch.linspace(-RANGE, RANGE, 200 * BINS + 1, dtype=torch.float64)
    density = torch.exp(-double_well(torch.stack([points, torch.zeros_like(points)], 1)))
    windows = density.unfold(0, 201, 200)
    free_energy = -torch.trapezoid(windows, dx=2.0 * RANGE / (200 * BINS)).log()
    return free_energy - free_energy.mean()


class ProfileError(NamedTuple):
    """Root mean squares over bins, kT: of the mean profile's error, of the deviation between repeats, and of both."""

    bias: float
    deviation: float
    total: float


@dataclass(frozen=True)
class FreeEnergyErrors:
    """Errors without and with weights, effective sample size in percent, and number of empty bins of all repeats."""

    plain: ProfileError
    reweighted: ProfileError
    effective_sample_percent: float
    empty: int


def evaluate(flow: StochasticFlow, seed: int, repeats: int, samples: int) -> FreeEnergyErrors:
    """Compare free energies of ``repeats`` times ``samples`` paths with quadrature.

    An empty bin counts as one sample of average weight; profiles are compared with their means over bins taken off.
    """
    edges = torch.linspace(-RANGE, RANGE, BINS + 1)
    profiles: tuple[list[Tensor], list[Tensor]] = ([], [])
    percents, empty = [], 0
    for repeat in range(repeats):
        paths = flow.sample(samples, torch.Generator().manual_seed(1000 * seed + repeat))
        bins = torch.bucketize(paths.value[:, 0].contiguous(), edges) - 1
        inside = (bins >= 0) & (bins < BINS)
        weights = samples * torch.softmax(paths.log_weights.double(), 0)
        percents.append(effective_sample_percent(paths.log_weights.numpy()))
        for kept, values in zip(profiles, (torch.ones_like(weights), weights), strict=True):
            counts = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins[inside], values[inside])
            free_energy = -torch.where(counts == 0.0, torch.ones_like(counts), counts).log()
            kept.append(free_energy - free_energy.mean())
        empty += int((counts == 0.0).sum())
    plain, reweighted = (_error(torch.stack(kept)) for kept in profiles)
    return FreeEnergyErrors(plain, reweighted, sum(percents) / len(percents), empty)


def _error(profiles: Tensor) -> ProfileError:
    bias = float((profiles.mean(0) - reference_profile()).square().mean())
    variance = float(profiles.var(0).mean())
    return ProfileError(math.sqrt(bias), math.sqrt(variance), math.sqrt(bias + variance))
