"""Works of mapping samples of one ensemble to another, with free energies and effective sample sizes from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.statistics.bootstrap import FloatArray
from ...core.statistics.estimates import effective_sample_percent
from .crystal import Crystal, CrystalCoordinates, RigidBijection, RigidMapResult
from .energies import BodyEnergy


class MappedSamples(NamedTuple):
    """Coordinates of mapped samples, and the works ``(S,)`` in kT: ``u_b(M(x)) - u_a(x) - log|det|``.

    Works are NaN where the target has no energy.
    """

    value: CrystalCoordinates
    log_det: Tensor
    reduced_target: Tensor
    works: Tensor


class Ensemble(NamedTuple):
    """The target ensemble: rigid bodies about a crystal at a temperature in K."""

    crystal: Crystal
    energy: BodyEnergy
    temperature: float

    def reduced(self, coordinates: CrystalCoordinates) -> Tensor:
        """Return ``U / kT`` ``(B,)``, differentiable once."""
        return self.energy.reduced(self.crystal.configuration(coordinates), self.temperature)


def carried(
    flow: RigidBijection, coordinates: CrystalCoordinates, reduced_base: Tensor, target: Ensemble
) -> MappedSamples:
    """Return samples of the base mapped by ``flow``, differentiable with respect to its parameters.

    Args:
        flow: base -> target.
        coordinates: samples of the base.
        reduced_base: ``(B,)``, ``U_a / kT_a`` of the samples, or ``-log p`` of a base with a density.
        target: target ensemble.
    """
    result: RigidMapResult = flow(coordinates)
    reduced = target.reduced(result.value)
    return MappedSamples(result.value, result.log_det, reduced, reduced - reduced_base - result.log_det)


def selected(coordinates: CrystalCoordinates, indices: Tensor | slice) -> CrystalCoordinates:
    """Return the configurations that indices or a slice select."""
    return CrystalCoordinates(*(part[indices] for part in coordinates))


class WorkSummary(NamedTuple):
    """Summary of works, in kT and percent.

    Attributes:
        mean: an upper bound of the free-energy difference; how far above it is what training lowers.
        free_energy: ``-log <exp(-work)>``: from the base alone.
        effective_percent: Kish's effective sample size of the weights ``exp(-work)``, unclipped.
        unusable: samples without an energy, which count as weight zero.
    """

    mean: float
    free_energy: float
    effective_percent: float
    unusable: int


def summary(works: FloatArray) -> WorkSummary:
    """Return the summary of works ``(S,)`` of equally weighted samples."""
    usable = np.isfinite(works)
    kept = works[usable]
    free_energy = float(np.log(len(works)) - np.logaddexp.reduce(-kept))
    log_weights = np.where(usable, -works, -np.inf)
    return WorkSummary(float(kept.mean()), free_energy, effective_sample_percent(log_weights), int((~usable).sum()))


def works_of(
    flow: RigidBijection, coordinates: CrystalCoordinates, reduced_base: Tensor, target: Ensemble, chunk: int = 512
) -> FloatArray:
    """Return the works ``(S,)`` of many samples, without gradients."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(reduced_base), chunk):
            part = slice(start, start + chunk)
            parts.append(carried(flow, selected(coordinates, part), reduced_base[part], target).works)
    return torch.cat(parts).double().numpy()
