"""Spin densities at nuclei, where the densities of both spins are large and nearly equal.

The density at a nucleus follows from moving one electron there. With chi any distribution about the nucleus,

    rho(0) = E[ sum_i chi(r_i) |Psi(r_i -> 0)|^2 / |Psi|^2 ],

without a delta function, and with little noise where chi resembles the density of a 1s electron: chi ~ exp(-2 Z r) within a
few 1/Z. In a spin density the contributions of core electrons of both spins cancel only on average, so the spins are averaged
first. Electron i and the other electrons nearest to the nucleus exchange their spins in all ways, each weighted by its own
|Psi|^2; the choice of these electrons depends neither on spins nor on r_i, so this is an exact average over a part of the
configuration. The sum of all |Psi|^2 also has no nodes. Most of the remaining noise comes from the position of the other core
electron relative to the valence shell, which is averaged over a reflection through the nucleus in the same way.

There is no fit and no extrapolation; the only bias is that of the wave function. (R. Assaraf, M. Caffarel and A. Scemama,
Phys. Rev. E 75, 035701 (2007), estimate the same numbers with a zero-variance principle.) With a step of the parameters on the
samples (:mod:`~flowbridge.calculators.qmc.density.parameter_response`), the value follows the polarising parameters, and its
error includes their noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....core.statistics.bootstrap import Estimate
from ..density.parameter_response import ParameterSteps
from ..wave_function.atomic_functions import AtomicFunctions
from ..wave_function.sampling import ElectronSamples, leave_one_out, walker_groups
from ..wave_function.wave_function import SlaterJastrow
from .properties import jackknife

_EXCHANGED = 6
"""Number of electrons that exchange their spins, in at most twenty ways."""

_REACH = 4.0  # of chi, in 1/Z
_ROWS = 1024  # configurations at once
_GROUPS = 32


def spin_contact_densities(
    samples: ElectronSamples,
    wave_function: SlaterJastrow,
    steps: ParameterSteps | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Estimate[NDArray[np.float64]]:
    """Return the density of spin up less that of spin down at the nuclei ``(A,)``, in e/bohr^3, with jackknife errors.

    Args:
        samples: samples of ``wave_function``.
        wave_function: sampled wave function.
        steps: steps of its parameters on these samples; None for exact parameters.
        progress: function that receives the number of sweeps done.
    """
    molecule = samples.molecule
    groups = _GROUPS if steps is None else len(steps.steps) - 1
    owners = walker_groups(samples.kinetic.shape[1], groups)
    shape = (groups, len(molecule.numbers))
    odd = _odd_terms(wave_function)
    values, slopes = torch.zeros(shape, dtype=torch.float64), torch.zeros(*shape, odd.number, dtype=torch.float64)
    terms = torch.zeros(groups, odd.number, dtype=torch.float64)
    usual = (torch.arange(molecule.electrons) >= molecule.spin_up)[None, None]
    for sweep, positions in enumerate(samples.positions):
        terms.index_add_(0, owners, odd.sums(positions, usual)[:, 0])
        for nucleus, (center, charge) in enumerate(zip(molecule.centers, molecule.charges, strict=True)):
            value, slope = _moved_there(wave_function, odd, positions, center, float(charge))
            values[:, nucleus].index_add_(0, owners, value)
            slopes[:, nucleus].index_add_(0, owners, slope)
        if progress is not None:
            progress(sweep + 1)
    counts = leave_one_out(len(samples.positions) * torch.bincount(owners, minlength=groups).double())[:, None]
    results = leave_one_out(values) / counts
    if steps is not None:
        mean_terms = leave_one_out(terms) / counts
        response = leave_one_out(slopes) / counts[..., None] - results[..., None] * mean_terms[:, None]
        results = results + 2.0 * torch.einsum("gak,gk->ga", response, steps.steps[:, odd.places])
    return jackknife(results)


class _OddTerms(NamedTuple):
    """The terms of a Jastrow factor whose sign depends on the spin, and the place of their parameters."""

    functions: tuple[AtomicFunctions, Tensor] | None
    places: slice

    @property
    def number(self) -> int:
        return 0 if self.functions is None else self.functions[1].shape[1]

    def sums(self, positions: Tensor, down: Tensor) -> Tensor:
        """Return the terms ``(R, A, K)`` at ``positions`` ``(R, N, 3)`` for spins ``(R, A, N)``."""
        signs = torch.where(down, -1.0, 1.0).to(positions.dtype)
        if self.functions is None:
            return positions.new_zeros(len(positions), down.shape[1], 0)
        functions, contraction = self.functions
        values = functions.evaluate(positions.reshape(-1, 3), contraction).values
        return signs @ values.reshape(self.number, *positions.shape[:2]).permute(1, 2, 0)


def _odd_terms(wave_function: SlaterJastrow) -> _OddTerms:
    jastrow = wave_function.jastrow
    if jastrow is None or jastrow.polarising is None:
        return _OddTerms(None, slice(0, 0))
    return _OddTerms(jastrow.polarising, slice(sum(jastrow.counts[:-1]), jastrow.count))


def _moved_there(
    wave_function: SlaterJastrow, odd: _OddTerms, positions: Tensor, center: Tensor, charge: float
) -> tuple[Tensor, Tensor]:
    """Return the estimator for the nucleus at ``center`` at every walker ``(W,)``, and the same times odd terms ``(W, K)``."""
    distances = torch.linalg.vector_norm(positions - center, dim=2)
    walkers, electrons = (distances < _REACH / charge).nonzero().T
    others = distances[walkers]
    others[torch.arange(len(walkers)), electrons] = -1.0  # the moved electron comes first, wherever it was
    nearest = others.argsort(1)[:, :_EXCHANGED]
    shares, slopes = positions.new_empty(len(walkers)), positions.new_empty(len(walkers), odd.number)
    usual = torch.arange(positions.shape[1]) >= wave_function.molecule.spin_up
    downs = usual[nearest].sum(1)
    for count in downs.unique().tolist():
        ways = _distributions(nearest.shape[1], count)
        for rows in (downs == count).nonzero()[:, 0].split(_ROWS):
            down = usual.repeat(len(rows), len(ways), 1)
            down.scatter_(2, nearest[rows, None].expand(-1, len(ways), -1), ways.expand(len(rows), -1, -1))
            shares[rows], slopes[rows] = _polarisation(
                wave_function, odd, positions[walkers[rows]], nearest[rows, :2], down, center
            )
    reach = 2.0 * _REACH
    within = 1.0 - math.exp(-reach) * (1.0 + reach + 0.5 * reach**2)
    chi = charge**3 / (math.pi * within) * (-2.0 * charge * distances[walkers, electrons]).exp()
    return (
        positions.new_zeros(len(positions)).index_add_(0, walkers, chi * shares),
        positions.new_zeros(len(positions), odd.number).index_add_(0, walkers, chi[:, None] * slopes),
    )


def _polarisation(
    wave_function: SlaterJastrow, odd: _OddTerms, positions: Tensor, nearest: Tensor, down: Tensor, center: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``sum +-|Psi(r_i -> 0)|^2 / sum |Psi|^2`` ``(R,)`` over spins and the reflection, and with odd terms ``(R, K)``.

    Args:
        wave_function: Psi.
        odd: terms of its Jastrow factor.
        positions: ``(R, N, 3)``.
        nearest: indices ``(R, 2)`` of the electron to move and the one to reflect; ``(R, 1)`` where there is no other.
        down: A distributions of spins ``(R, A, N)``.
        center: position of the nucleus.
    """
    rows = torch.arange(len(positions))
    moved = positions.clone()
    moved[rows, nearest[:, 0]] = center
    before, after = [positions], [moved]
    if nearest.shape[1] > 1:
        for found in (before, after):
            reflected = found[0].clone()
            reflected[rows, nearest[:, 1]] = 2.0 * center - reflected[rows, nearest[:, 1]]
            found.append(reflected)
    total = torch.cat([2.0 * wave_function.spin_logarithms(place, down) for place in before], 1).logsumexp(1)
    signs = 1.0 - 2.0 * down[rows, :, nearest[:, 0]].to(positions.dtype)  # (R, A), of the moved electron
    value, slope = positions.new_zeros(len(positions)), positions.new_zeros(len(positions), odd.number)
    for place in after:
        weights = signs * (2.0 * wave_function.spin_logarithms(place, down) - total[:, None]).exp()
        value += weights.sum(1)
        slope += torch.einsum("ra,rak->rk", weights, odd.sums(place, down))
    return value, slope


def _distributions(electrons: int, down: int) -> Tensor:
    """Return all ways ``(A, k)`` to choose ``down`` of ``electrons`` electrons."""
    ways = torch.zeros(math.comb(electrons, down), electrons, dtype=torch.bool)
    for way, members in zip(ways, itertools.combinations(range(electrons), down), strict=True):
        way[list(members)] = True
    return ways
