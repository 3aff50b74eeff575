"""A trained flow of one molecule: a density of its conformations that is at the same time an energy function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.execution.executors import Executor
from ...core.generator import GeneratorPotential
from ...core.model_files.files import from_bytes, to_bytes
from ...core.potential import Particles, PotentialMetadata
from ...core.reweighting import Draws
from ...core.samples import WeightedSamples
from .configuration import FlowConfiguration
from .coordinate_flow import CoordinateFlow
from .molecule_coordinates import Coordinates, MoleculeCoordinates
from .zmatrix import build_zmatrix

_REVISION = 2  # of the meaning of stored parameters: raise it when the same tensors would give another density
_SMALLEST_JOB = 256  # configurations that are worth a journey to another process
_CHUNK = 8192  # configurations at once: large enough to amortise dispatch, small enough to stay in cache


class BoltzmannGenerator(GeneratorPotential):
    """A smooth normalizing flow on the internal coordinates of a molecule (arXiv 2110.00351).

    ``log_prob`` is the density of Cartesian positions with rigid motion left out: it is invariant under rotations and
    translations, and includes the full Jacobian of the internal coordinates. As a Potential its energy is ``-kT log p``.
    """

    kind: ClassVar[str] = "boltzmann_generator"
    description: ClassVar[str] = "a Boltzmann generator of one molecule"

    def __init__(
        self,
        particles: Particles,
        temperature: float,
        coordinates: MoleculeCoordinates,
        configuration: FlowConfiguration,
    ) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(particles, periodic=False, temperature=temperature)
        self.flow_configuration = configuration
        self.coordinates = coordinates
        self.flow = CoordinateFlow(coordinates, configuration)

    @classmethod
    def untrained(
        cls,
        particles: Particles,
        temperature: float,
        positions: NDArray[np.float64],
        configuration: FlowConfiguration | None = None,
    ) -> Self:
        """Return a generator whose coordinates are fitted to frames ``(F, N, 3)`` nm and whose networks are fresh."""
        configuration = configuration or FlowConfiguration()
        coordinates = MoleculeCoordinates.fit(particles, positions, configuration)
        return cls(particles, temperature, coordinates, configuration)

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of positions ``(B, N, 3)`` in nm (density per nm^(3N-6))."""
        coordinates, log_det = self.coordinates.inverse(positions)
        return self.flow.log_prob(coordinates).double() + log_det

    def sample_positions(self, count: int, generator: torch.Generator, executor: Executor | None = None) -> Draws:
        """Draw ``count`` configurations with their log-densities; centred at the origin in a fixed orientation.

        Args:
            count: number of samples.
            generator: of the latent variables, which are drawn here: samples do not depend on where they are computed.
            executor: other processes or machines to compute them; None for this process.
        """
        if count < 1:
            raise ConfigurationError(f"the number of samples must be positive, got {count}")
        sizes = (min(_CHUNK, count - start) for start in range(0, count, _CHUNK))
        latents = (self.flow.sample_latent(size, generator) for size in sizes)
        if executor is None:
            with torch.no_grad():
                parts = [self.positions_of(latent) for latent in latents]
        else:
            parts = distributed_positions(self, list(latents), executor)
        return Draws(torch.cat([part.positions for part in parts]), torch.cat([part.log_prob for part in parts]))

    def positions_of(self, latent: Coordinates) -> Draws:
        """Return the configurations of latent variables, and their log-densities; differentiable.

        The density is evaluated at the positions as they are handed out, so that rounding in the root finding or in float32
        cannot separate a sample from its weight. Where the flow puts a bond or an angle outside its range, which is no
        configuration, the log-density is ``+inf``: such a draw has no weight, no chance to be accepted, and infinite work.
        """
        coordinates, _ = self.flow(latent)
        positions, log_volume = self.coordinates(coordinates)
        positions = positions - positions.mean(1, keepdim=True)
        log_prob = self.log_prob(positions)
        return Draws(positions, torch.where(torch.isnan(log_volume), torch.full_like(log_prob, torch.inf), log_prob))

    def sample(self, count: int, target: Any, seed: int = 0, executor: Executor | None = None) -> WeightedSamples:
        """Draw weighted samples; see :meth:`GeneratorPotential.sample`.

        Args:
            count: number of samples.
            target: see there.
            seed: random seed.
            executor: other processes or machines to draw the configurations; their energies are evaluated where
                ``target`` does.
        """
        draws = self.sample_positions(count, torch.Generator().manual_seed(seed), executor)
        return self.weighted(draws, target, seed)

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
        return {
            "revision": _REVISION,
            "particles": self.metadata.particles.to_dict(),
            "temperature": self.metadata.temperature,
            "layout": self.coordinates.describe(),
            "flow": self.flow_configuration.model_dump(mode="json"),
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Model.from_configuration`."""
        if configuration.get("revision") != _REVISION:
            raise ConfigurationError(
                f"the flow was stored in revision {configuration.get('revision', 1)} of its parameters, this flowbridge reads "
                f"revision {_REVISION}: train it again, or use the version that the file names"
            )
        particles = Particles.from_dict(configuration["particles"])
        flow = FlowConfiguration.model_validate(configuration["flow"])
        layout = MoleculeCoordinates.layout_from(configuration["layout"])
        coordinates = MoleculeCoordinates(build_zmatrix(particles), layout, flow)
        return cls(particles, float(configuration["temperature"]), coordinates, flow)


@dataclass(frozen=True)
class _Draw:
    """Latent variables on their way to another process, with the generator that they belong to."""

    number: int
    model: bytes
    circular: NDArray[Any]
    stiff: NDArray[Any]


def distributed_positions(model: BoltzmannGenerator, latents: list[Coordinates], executor: Executor) -> list[Draws]:
    """Return the samples of latent variables, computed elsewhere in pieces that keep all jobs busy."""
    blob = to_bytes(model)
    circular, stiff = (torch.cat(list(parts)) for parts in zip(*latents, strict=True))
    size = min(max(_SMALLEST_JOB, -(-len(stiff) // (2 * executor.workers))), _CHUNK)
    pieces = zip(circular.split(size), stiff.split(size), strict=True)
    jobs = [_Draw(number, blob, *(part.numpy() for part in piece)) for number, piece in enumerate(pieces)]
    made = {number: (positions, log_prob) for number, positions, log_prob in executor(_positions_of_draw, jobs)}
    return [Draws(*map(torch.as_tensor, made[number])) for number in range(len(jobs))]


def _positions_of_draw(draw: _Draw) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    with torch.no_grad():
        samples = _model_of(draw.model).positions_of(Coordinates(torch.tensor(draw.circular), torch.tensor(draw.stiff)))
    return draw.number, samples.positions.numpy(), samples.log_prob.numpy()


@lru_cache(maxsize=1)
def _model_of(blob: bytes) -> BoltzmannGenerator:
    model = from_bytes(blob)
    if not isinstance(model, BoltzmannGenerator):
        raise ConfigurationError(f"cannot draw samples of a {type(model).__name__}")
    return model
