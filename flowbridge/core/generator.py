"""The contract of densities that can be drawn from, and what those have in common that are potentials as well."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import ConfigurationError
from .potential import Potential, PotentialMetadata
from .reweighting import Draws, reweight
from .samples import WeightedSamples
from .units import thermal_energy


@runtime_checkable
class Generator(Protocol):
    """A normalised density of the positions of some particles, to evaluate and to draw from.

    Weighted samples of a Boltzmann distribution follow from these by :func:`~flowbridge.core.reweighting.reweight`.
    """

    metadata: PotentialMetadata
    """The particles, and the temperature that the density belongs to."""

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of positions ``(B, N, 3)`` in nm."""
        ...

    def sample_positions(self, count: int, generator: torch.Generator) -> Draws:
        """Draw ``count`` configurations with their log-densities, all random numbers from ``generator``."""
        ...


class GeneratorPotential(Potential):
    """A generator as a potential of mean force: its energy is ``-kT log p`` at its own temperature.

    A subclass writes ``log_prob`` and ``sample_positions`` (see :class:`Generator`) and what a Potential has besides an energy.
    """

    description: ClassVar[str] = "a generator"

    @property
    def temperature(self) -> float:
        """K; raises ConfigurationError where the metadata have none."""
        if self.metadata.temperature is None:
            raise ConfigurationError(
                f"{self.description} without a temperature has neither an energy scale nor weights"
            )
        return self.metadata.temperature

    def log_prob(self, positions: Tensor) -> Tensor:
        """See :meth:`Generator.log_prob`."""
        raise TypeError(f"{type(self).__name__} defines no density: write its log_prob(positions)")

    def sample_positions(self, count: int, generator: torch.Generator) -> Draws:
        """See :meth:`Generator.sample_positions`."""
        raise TypeError(f"{type(self).__name__} cannot be drawn from: write its sample_positions(count, generator)")

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return ``-kT log p`` ``(B,)`` in kJ/mol; see :meth:`Potential.forward`.

        Raises ConfigurationError for global parameters, and for a cell unless it is the one that the density belongs to.
        """
        self.check_arguments(cell, global_parameters)
        return -thermal_energy(self.temperature) * self.log_prob(positions)

    def example_positions(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Potential.example_positions`: samples of the density."""
        return self.sample_positions(count, generator).positions

    def sample(self, count: int, target: Any, seed: int = 0) -> WeightedSamples:
        """Draw weighted samples of the Boltzmann distribution of ``target`` at this generator's temperature.

        Args:
            count: number of samples.
            target: an ``openmm.System``, a Potential, the path of its model file (then compiled for this machine), or any
                BatchedEnergy, of the same particles. It must not depend on what the density leaves out: where an isolated
                molecule or cluster is and how it is turned.
            seed: random seed.

        Returns:
            Samples with weights ``exp(-U/kT) / p``, unnormalised and unclipped; see
            :func:`~flowbridge.core.reweighting.reweight` for draws without an energy.
        """
        return self.weighted(self.sample_positions(count, torch.Generator().manual_seed(seed)), target, seed)

    def weighted(self, draws: Draws, target: Any, seed: int) -> WeightedSamples:
        """Return draws that were made with ``seed`` as :meth:`sample` does."""
        digest = self.model_file.digest if self.model_file else None
        provenance = {"seed": seed, "model_digest": digest}
        return reweight(draws, target, self.metadata.particles, self.temperature, provenance=provenance)
