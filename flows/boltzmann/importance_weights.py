"""Samples of a density as weighted samples of a Boltzmann distribution."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ...core.energy import as_batched_energy
from ...core.errors import ConfigurationError
from ...core.potential import Potential
from ...core.samples import WeightedSamples
from ...core.units import thermal_energy


class Draws(Protocol):
    """Positions ``(S, N, 3)`` nm and their log-densities ``(S,)``, float64."""

    @property
    def positions(self) -> Tensor:
        """``(S, N, 3)`` in nm."""

    @property
    def log_prob(self) -> Tensor:
        """``(S,)``."""


def importance_samples(generator: Potential, draws: Draws, target: Any, seed: int) -> WeightedSamples:
    """Return draws with weights ``exp(-U/kT) / p``, unnormalised and unclipped.

    Args:
        generator: the density that was drawn from, with its particles and its temperature.
        draws: samples of it.
        target: energy, in any form of :func:`~flowbridge.core.energy.as_batched_energy`.
        seed: random seed of the draws, for the provenance.

    Returns:
        All draws: one whose energy is not finite gets weight 0 and stays in the set, so that the effective sample size
        counts it.
    """
    energy = as_batched_energy(target)
    temperature = generator.metadata.temperature
    if temperature is None:
        raise ConfigurationError("this generator has no temperature: weights are not defined")
    positions = draws.positions.numpy()
    energies, _ = energy.energies_and_forces(positions)
    reduced = energies / thermal_energy(temperature)
    log_prob = draws.log_prob.numpy()
    usable = np.isfinite(reduced) & np.isfinite(log_prob)
    log_weights = np.where(usable, -reduced - log_prob, -np.inf)
    return WeightedSamples(
        positions=positions,
        log_weights=log_weights,
        reduced_potentials={"target": reduced, "generator": -log_prob},
        particles=generator.metadata.particles,
        temperature=temperature,
        provenance={
            "seed": seed,
            "count": len(positions),
            "without_finite_energy": int((~usable).sum()),
            "model_digest": generator.model_file.digest if generator.model_file else None,
            "target": str(target) if isinstance(target, (str, Path)) else _type_name(target),
            "versions": {name: version(name) for name in ("flowbridge", "torch", "numpy")},
        },
    )


def _type_name(target: object) -> str:
    return f"{type(target).__module__}.{type(target).__qualname__}"
