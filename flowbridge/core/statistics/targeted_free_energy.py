"""Free-energy differences between two ensembles through a map from the configurations of one to those of the other.

Targeted free-energy perturbation (C. Jarzynski, Phys. Rev. E 65, 046122 (2002)), evaluated in both directions at once
by Bennett's acceptance ratio (A. M. Hahn, H. Then, Phys. Rev. E 79, 011113 (2009)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import logsumexp

from ..energy import BatchedEnergy, as_batched_energy
from ..errors import MoleculeMismatchError, NonFiniteEnergyError
from ..samples import WeightedSamples
from ..units import thermal_energy
from .bennett import MINIMUM_OVERLAP, weighted_acceptance_ratio
from .bootstrap import DEFAULT_REPLICAS, Estimate, FloatArray

Positions = np.ndarray[Any, np.dtype[np.float64]]


class ConfigurationMap(Protocol):
    """An invertible map from configurations of ensemble a to those of ensemble b."""

    def forward(self, positions: Positions) -> tuple[Positions, FloatArray]:
        """Return mapped positions ``(S, N, 3)`` in nm and the logarithms ``(S,)`` of the map's Jacobian determinants there."""
        ...

    def inverse(self, positions: Positions) -> tuple[Positions, FloatArray]:
        """Return what :meth:`forward` maps to ``positions``, and the logarithms of the inverse map's determinants."""
        ...


@dataclass(frozen=True)
class TargetedFreeEnergy:
    """A free-energy difference ``F_b - F_a`` and its works, in kT.

    Attributes:
        difference: estimate from both directions by Bennett's acceptance ratio.
        forward_works: ``(S,)``, ``u_b(M(x)) - u_a(x) - log |dM/dx|`` of samples of a; ``+inf`` where b is impossible.
        reverse_works: ``(T,)``, ``u_a(M^-1(y)) - u_b(y) - log |dM^-1/dy|`` of samples of b.
        forward: ``-log <exp(-work)>`` from samples of a alone.
        reverse: the same from samples of b alone, with the sign of the difference. Where the two differ by more than their
            error, the map is too poor for these numbers of samples.
    """

    difference: Estimate[float]
    forward_works: FloatArray
    reverse_works: FloatArray
    forward: float
    reverse: float


def targeted_free_energy(
    samples_a: WeightedSamples,
    samples_b: WeightedSamples,
    energy_a: Any,
    energy_b: Any,
    mapping: ConfigurationMap,
    *,
    minimum_overlap: float = MINIMUM_OVERLAP,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> TargetedFreeEnergy:
    """Return ``F_b - F_a`` of the configurations, in kT, each ensemble at the temperature of its samples.

    The ensembles may differ in the force field, in the temperature or in both, and need not overlap: it is the mapped samples
    that have to. A map that carries one ensemble exactly into the other gives the difference without any error. The kinetic
    part, which depends on temperatures and masses only, is not included.

    Args:
        samples_a: samples that represent ensemble a by their weights.
        samples_b: the same for ensemble b.
        energy_a: an ``openmm.System``, a Potential, the path of a model file, or any
            :class:`~flowbridge.core.energy.BatchedEnergy`, of ensemble a.
        energy_b: the same of ensemble b.
        mapping: map from a to b, such as a :class:`~flowbridge.flows.boltzmann.generator_map.GeneratorMap`.
        minimum_overlap: the larger of the two elements of the overlap matrix must reach this.
        blocks: number of blocks of consecutive samples; None for 100.
        replicas: number of bootstrap replicas.
        seed: random seed of the bootstrap.

    Raises:
        MoleculeMismatchError: when the samples are of different particles.
        OverlapError: when the mapped ensembles share too few configurations; the message has the overlap.
        NonFiniteEnergyError: when a sample with weight has no finite energy in its own ensemble, or a map gives NaN.
    """
    if samples_a.particles != samples_b.particles:
        raise MoleculeMismatchError("the two sets of samples are of different particles: the map cannot join them")
    potential_a = _reduced(as_batched_energy(energy_a), samples_a.temperature)
    potential_b = _reduced(as_batched_energy(energy_b), samples_b.temperature)
    forward = _works(samples_a, potential_a, potential_b, mapping.forward, "a")
    reverse = _works(samples_b, potential_b, potential_a, mapping.inverse, "b")
    difference = weighted_acceptance_ratio(
        forward,
        -reverse,
        samples_a.log_weights,
        samples_b.log_weights,
        minimum_overlap=minimum_overlap,
        blocks=blocks,
        replicas=replicas,
        seed=seed,
    )
    one_sided = _exponential_average(forward, samples_a), -_exponential_average(reverse, samples_b)
    return TargetedFreeEnergy(difference, forward, reverse, *one_sided)


def _reduced(energy: BatchedEnergy, temperature: float) -> Callable[[Positions], FloatArray]:
    def reduced_potential(positions: Positions) -> FloatArray:
        return energy.energies(positions) / thermal_energy(temperature)

    return reduced_potential


def _works(
    samples: WeightedSamples,
    own: Callable[[Positions], FloatArray],
    other: Callable[[Positions], FloatArray],
    move: Callable[[Positions], tuple[Positions, FloatArray]],
    name: str,
) -> FloatArray:
    """Return the works ``(S,)`` of moving samples from their own ensemble to the other."""
    positions = samples.positions.astype(np.float64)
    before = own(positions)
    mapped, log_determinants = move(positions)
    if mapped.shape != positions.shape or log_determinants.shape != before.shape:
        raise ValueError(
            f"the map returned positions {mapped.shape} and log-determinants {log_determinants.shape} for positions "
            f"{positions.shape}: expected {positions.shape} and {before.shape}"
        )
    weighted = samples.log_weights > -np.inf
    broken = weighted & ~(np.isfinite(before) & np.isfinite(log_determinants) & np.isfinite(mapped).all(axis=(1, 2)))
    if broken.any():
        raise NonFiniteEnergyError(
            f"{int(broken.sum())} of {len(samples)} samples of ensemble {name} have no finite energy there or cannot be "
            f"mapped, the first at index {int(np.argmax(broken))}: are they samples of that ensemble?"
        )
    after = other(mapped)
    # What the other ensemble cannot evaluate, it does not hold.
    return np.where(np.isfinite(after), after, np.inf) - before - log_determinants


def _exponential_average(works: FloatArray, samples: WeightedSamples) -> float:
    return -float(logsumexp(samples.log_weights - works) - logsumexp(samples.log_weights))
