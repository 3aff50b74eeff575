"""Prior energies from the statistics of mapped frames: Boltzmann inversion, coordinate by coordinate."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ..core.configuration import StrictModel
from ..core.errors import ConfigurationError
from ..core.potential import Particles
from ..core.units import thermal_energy
from .beads.geometry import angles, distances, torsion_cosines
from .beads.graphs import bonded_angles, bonded_torsions, pairs_apart
from .prior_terms import (
    ExcludedVolume,
    FourierTorsions,
    HarmonicAngles,
    HarmonicBonds,
    MorseBonds,
    PriorEnergy,
    PriorTerm,
)

_FEWEST = 20
_BINS = 72
_SMALLEST_SPREAD = 1e-5  # nm or radians: less was constrained
_BLOWN_APART = 3.0  # times the median length of a bond


class PriorConfiguration(StrictModel):
    """Prior terms of a force field and their fit.

    Attributes:
        bonds: ``harmonic`` with the variance of the data, ``morse`` with the same curvature, or ``none``.
        morse_depth: kT, of a Morse bond.
        angles: ``harmonic`` or ``none``.
        torsion_harmonics: Fourier terms of every torsion; 0 for none.
        torsion_floor: least density of a torsion, relative to uniform, that is inverted: what the data never saw is no
            infinite barrier.
        repulsion: stiffness k of ``k/2 (d - d0)^2`` for pairs closer than d0, in kT/nm^2; 0 for none. 3200 is the 1600 (d -
            d0)^2 of arXiv 2203.11167.
        repulsion_range: d0 in nm for all pairs; None for the ``repulsion_quantile`` of each pair's distances.
        repulsion_quantile: fraction of the frames in which a pair is closer than its d0.
        repulsion_bonds: pairs that at least so many bonds separate repel each other.
    """

    bonds: Literal["harmonic", "morse", "none"] = "harmonic"
    morse_depth: PositiveFloat = 60.0
    angles: Literal["harmonic", "none"] = "harmonic"
    torsion_harmonics: NonNegativeInt = 0
    torsion_floor: float = Field(default=0.02, gt=0.0, lt=1.0)
    repulsion: NonNegativeFloat = 0.0
    repulsion_range: PositiveFloat | None = None
    repulsion_quantile: float = Field(default=1e-3, ge=0.0, lt=1.0)
    repulsion_bonds: PositiveInt = 3


def fit_prior(
    beads: Particles,
    positions: NDArray[Any],
    temperature: float,
    settings: PriorConfiguration,
    weights: NDArray[np.float64] | None = None,
) -> PriorEnergy:
    """Return prior terms fitted to frames.

    Args:
        beads: beads with their bonds.
        positions: positions of the beads ``(F, n, 3)`` in nm.
        temperature: temperature of the frames in K.
        settings: terms and their fit.
        weights: weights of the frames ``(F,)``, any scale; None for equal ones.

    Raises:
        ConfigurationError: for too few frames, bonds that do not vary, beads without bonds, and molecules that are broken.
    """
    if len(positions) < _FEWEST:
        raise ConfigurationError(f"a prior needs at least {_FEWEST} frames for its statistics, got {len(positions)}")
    if settings.bonds != "none" and not beads.bonds:
        raise ConfigurationError(
            "the beads have no bonds, and a prior was asked for them: the topology of the atoms lacks its bonds "
            "(CONECT), or set "
            'bonds = "none"'
        )
    weights = np.full(len(positions), 1.0 / len(positions)) if weights is None else weights / weights.sum()
    frames, kt = torch.as_tensor(np.asarray(positions, dtype=np.float64)), thermal_energy(temperature)
    refuse_broken(beads, positions)
    terms: list[PriorTerm] = []
    if settings.bonds != "none":
        terms.append(_bonds(beads, frames, weights, kt, settings))
    triplets = bonded_angles(beads)
    if settings.angles != "none" and triplets:
        mean, variance = _moments(angles(frames, torch.tensor(triplets)), weights)
        _refuse_rigid(variance, "angle", triplets, beads)
        terms.append(HarmonicAngles(triplets, centres=mean, stiffness=kt / variance))
    if settings.torsion_harmonics and bonded_torsions(beads):
        terms.append(_torsions(beads, frames, weights, kt, settings))
    pairs = pairs_apart(beads, settings.repulsion_bonds)
    if settings.repulsion and pairs:
        found = distances(frames, torch.tensor(pairs)).numpy()
        ranges = np.full(len(pairs), settings.repulsion_range) if settings.repulsion_range else None
        if ranges is None:
            ranges = np.array([_quantile(column, weights, settings.repulsion_quantile) for column in found.T])
        stiffness = np.full(len(pairs), settings.repulsion * kt)
        terms.append(ExcludedVolume(pairs, ranges=ranges, stiffness=stiffness))
    return PriorEnergy(beads, terms, temperature)


def refuse_broken(beads: Particles, positions: NDArray[Any]) -> None:
    """Raise ConfigurationError when bonded beads are far apart in some frame: the molecule was cut by a periodic box."""
    if not beads.bonds:
        return
    first, second = np.array(beads.bonds).T
    lengths = np.linalg.norm(positions[:, first] - positions[:, second], axis=2)
    broken = lengths > _BLOWN_APART * np.median(lengths, axis=0)
    if broken.any():
        frame, bond = np.argwhere(broken)[0]
        i, j = beads.bonds[bond]
        raise ConfigurationError(
            f"the molecule is broken in {int(broken.any(axis=1).sum())} of {len(positions)} frames: in frame {frame} "
            f"beads {i} and {j} ({beads.names[i]}, {beads.names[j]}), which are bonded, are {lengths[frame, bond]:.3f} nm "
            f"apart, in most frames {np.median(lengths[:, bond]):.3f} nm. Make molecules whole first, say by mdtraj's "
            "make_molecules_whole()"
        )


def _bonds(
    beads: Particles, frames: Tensor, weights: NDArray[np.float64], kt: float, settings: PriorConfiguration
) -> PriorTerm:
    mean, variance = _moments(distances(frames, torch.tensor(beads.bonds)), weights)
    _refuse_rigid(variance, "bond", beads.bonds, beads)
    if settings.bonds == "harmonic":
        return HarmonicBonds(beads.bonds, lengths=mean, stiffness=kt / variance)
    depth = settings.morse_depth * kt
    # The curvature at the minimum, 2 D a^2, is that of the harmonic bond.
    return MorseBonds(
        beads.bonds, lengths=mean, depths=np.full(len(mean), depth), widths=np.sqrt(kt / variance / (2.0 * depth))
    )


def _torsions(
    beads: Particles, frames: Tensor, weights: NDArray[np.float64], kt: float, settings: PriorConfiguration
) -> PriorTerm:
    quadruplets = bonded_torsions(beads)
    cosine, sine = torsion_cosines(frames, torch.tensor(quadruplets))
    found = torch.atan2(sine, cosine).numpy()
    edges = np.linspace(-np.pi, np.pi, _BINS + 1)
    centres = 0.5 * (edges[1:] + edges[:-1])
    orders = np.arange(1, settings.torsion_harmonics + 1)
    design = np.concatenate([np.cos(np.outer(centres, orders)), np.sin(np.outer(centres, orders))], axis=1)
    coefficients = []
    for column in found.T:
        density = np.histogram(column, edges, weights=weights)[0] * _BINS  # relative to uniform
        energy = -kt * np.log(np.maximum(density, settings.torsion_floor))
        coefficients.append(np.linalg.lstsq(design, energy - energy.mean(), rcond=None)[0])
    cosines, sines = np.split(np.array(coefficients), 2, axis=1)
    return FourierTorsions(quadruplets, cosines=cosines, sines=sines)


def _moments(values: Tensor, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    array = values.numpy()
    mean = weights @ array
    return mean, weights @ np.square(array - mean)


def _quantile(values: NDArray[np.float64], weights: NDArray[np.float64], quantile: float) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), quantile).clip(max=len(values) - 1)])


def _refuse_rigid(variance: NDArray[np.float64], what: str, indices: Any, beads: Particles) -> None:
    rigid = np.flatnonzero(variance < _SMALLEST_SPREAD**2)
    if len(rigid):
        named = "-".join(beads.names[i] for i in indices[rigid[0]])
        raise ConfigurationError(
            f"the {what} {named} of the beads does not vary in the frames: it was constrained, or all frames are the same"
        )
