"""Two Boltzmann generators as one invertible map between the ensembles that they were trained for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigurationError, MoleculeMismatchError
from .generator import BoltzmannGenerator

Array = np.ndarray[Any, np.dtype[np.float64]]
_CHUNK = 4096


class GeneratorMap:
    """Maps a configuration through the latent space of one generator into the other.

    Both generators push one base density forward, so the determinant of the map is the quotient of their densities. The better
    each fits its ensemble, the nearer the map carries one ensemble into the other: a
    :class:`~flowbridge.core.statistics.targeted_free_energy.ConfigurationMap`.

    Args:
        generator_a: generator of the ensemble to map from.
        generator_b: generator of the ensemble to map to, with the same kind of latent variables.

    Raises:
        MoleculeMismatchError: for generators of different particles.
        ConfigurationError: for generators whose latent variables differ.
    """

    def __init__(self, generator_a: BoltzmannGenerator, generator_b: BoltzmannGenerator) -> None:
        particles_a, particles_b = generator_a.metadata.particles, generator_b.metadata.particles
        if particles_a.atomic_numbers != particles_b.atomic_numbers or set(particles_a.bonds) != set(particles_b.bonds):
            raise MoleculeMismatchError(
                "the two generators are of different molecules: no map leads from one to the other"
            )
        bases = [generator.flow.uniform_base for generator in (generator_a, generator_b)]
        circular = [generator.coordinates.layout.circular for generator in (generator_a, generator_b)]
        if bases[0] != bases[1] or list(circular[0]) != list(circular[1]):
            raise ConfigurationError(
                f"the latent variables of the two generators differ: circular torsions {list(circular[0])} and "
                f"{list(circular[1])}, stiff coordinates {_kinds(bases)}. Fit both generators to the frames of both ensembles, "
                "with one flow configuration"
            )
        self.generator_a, self.generator_b = generator_a, generator_b

    def forward(self, positions: Array) -> tuple[Array, Array]:
        """Return positions ``(S, N, 3)`` nm of ensemble b, centred at the origin, and log-determinants ``(S,)``."""
        return self._mapped(positions, self.generator_a, self.generator_b)

    def inverse(self, positions: Array) -> tuple[Array, Array]:
        """Return positions ``(S, N, 3)`` nm of ensemble a, centred at the origin, and log-determinants ``(S,)``."""
        return self._mapped(positions, self.generator_b, self.generator_a)

    @staticmethod
    def _mapped(positions: Array, origin: BoltzmannGenerator, goal: BoltzmannGenerator) -> tuple[Array, Array]:
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for part in torch.as_tensor(np.ascontiguousarray(positions, dtype=np.float64)).split(_CHUNK):
                coordinates, _ = origin.coordinates.inverse(part)
                latent, _ = origin.flow.inverse(coordinates)
                mapped = goal.positions_of(latent)
                parts.append((mapped.positions, origin.log_prob(part) - mapped.log_prob))
        moved, log_determinants = (torch.cat(list(tensors)).double().numpy() for tensors in zip(*parts, strict=True))
        return moved, log_determinants


def _kinds(uniform: list[bool]) -> str:
    return " and ".join("uniform" if one else "normal" for one in uniform)
