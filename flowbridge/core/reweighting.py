"""Draws of any density as weighted samples of a Boltzmann distribution."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from .energy import as_batched_energy, described
from .errors import NonFiniteEnergyError
from .potential import Particles
from .samples import WeightedSamples
from .units import thermal_energy


class Draws(NamedTuple):
    """Positions ``(S, N, 3)`` in nm and log-densities ``(S,)``, float64.

    A log-density that is not finite says that the draw is no configuration.
    """

    positions: Tensor
    log_prob: Tensor


def reweight(
    draws: Draws,
    target: Any,
    particles: Particles,
    temperature: float,
    *,
    log_weights: ArrayLike = 0.0,
    paths: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> WeightedSamples:
    """Return draws with the weights ``exp(-U/kT) / p``, unnormalised and unclipped.

    Args:
        draws: what was drawn, with its log-density.
        target: what U is of: anything :func:`~flowbridge.core.energy.as_batched_energy` takes, of the same particles. Its
            forces are not evaluated where it can do without.
        particles: the N particles.
        temperature: K.
        log_weights: logarithms of weights ``(S,)`` that the draws have already, by which those towards the target are
            multiplied.
        paths: whether the log-densities are of paths, the known density of whose ends is missing then from the reduced
            potentials.
        provenance: what made the draws, ready for JSON; counts, target and package versions are added.

    Returns:
        All draws. One without a finite energy or a finite density gets weight 0 and stays in the set, so that the effective
        sample size counts it; an energy that is not finite is the reduced potential ``+inf``.

    Raises:
        NonFiniteEnergyError: when no draw has a weight.
    """
    positions = draws.positions.detach().cpu().numpy()
    log_prob = draws.log_prob.detach().double().cpu().numpy()
    reduced = as_batched_energy(target).energies(positions) / thermal_energy(temperature)
    finite = np.isfinite(reduced)
    usable = finite & np.isfinite(log_prob)
    if not (usable & (np.asarray(log_weights) > -np.inf)).any():
        raise NonFiniteEnergyError(
            f"all {len(usable)} samples have weight zero: {int((~finite).sum())} have no finite energy in {described(target)}, "
            f"{int((~np.isfinite(log_prob)).sum())} are no configuration with a density. Are generator and target of the same "
            "molecule, with its particles in the same order?"
        )
    with np.errstate(invalid="ignore"):  # what is not finite is not used
        weights = np.where(usable, -reduced - log_prob + log_weights, -np.inf)
    potentials = {"target": np.where(finite, reduced, np.inf)}
    if not paths:
        potentials["generator"] = -log_prob
    return WeightedSamples(
        positions,
        weights,
        particles,
        temperature,
        potentials,
        {
            **(provenance or {}),
            "count": len(positions),
            "without_finite_energy": int((~usable).sum()),
            "target": described(target),
            "versions": {name: version(name) for name in ("flowbridge", "torch", "numpy")},
        },
    )
