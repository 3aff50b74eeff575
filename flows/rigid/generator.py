"""A density of rigid bodies: their Boltzmann generator, and at the same time an energy function."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ...core.energy import as_batched_energy
from ...core.errors import ConfigurationError
from ...core.potential import Particles, Potential, PotentialMetadata
from ...core.samples import WeightedSamples
from ...core.units import thermal_energy
from .bodies import RigidBodies
from .configuration import RigidFlowConfiguration
from .crystal import Crystal, CrystalCoordinates, RigidChain
from .energies import BodyEnergy
from .harmonic import HarmonicBase, UniformBase, flat_dimension
from .maps.layers import FluctuationScales, coupling_layers
from .works import Ensemble

_CHUNK = 4096  # configurations at once


class BodySamples(NamedTuple):
    """Positions ``(S, N, 3)`` nm of all sites, and log-densities ``(S,)``."""

    positions: Tensor
    log_prob: Tensor


class RigidBodyGenerator(Potential):
    """A flow of rigid bodies from a base with a density: a harmonic crystal, or for a single body all orientations alike.

    ``log_prob`` is the density of the positions of the bodies relative to the first (per nm^3 each) and of all
    orientations (by shares of all orientations); as a Potential its energy is ``-kT log p``. Samples need no
    simulation, and their weights give the absolute free energy of the crystal.
    """

    kind: ClassVar[str] = "rigid_body_generator"

    def __init__(
        self,
        particles: Particles,
        temperature: float,
        bodies: RigidBodies,
        crystal: Crystal,
        base: HarmonicBase | UniformBase,
        configuration: RigidFlowConfiguration,
        scales: FluctuationScales,
    ) -> None:
        super().__init__()
        thermal_energy(temperature)
        check_sizes(particles, bodies, crystal)
        if isinstance(base, UniformBase) and bodies.count != 1:
            raise ConfigurationError(
                f"{bodies.count} bodies have relative positions, of which a uniform base says nothing: give a harmonic base"
            )
        self.metadata = PotentialMetadata(
            particles, periodic=crystal.box is not None, temperature=temperature, rigid=True
        )
        self.bodies, self.crystal, self.base = bodies, crystal, base
        self.flow_configuration, self.scales = configuration, scales
        self.flow = RigidChain(coupling_layers(crystal, configuration, scales))

    @classmethod
    def harmonic(
        cls,
        particles: Particles,
        temperature: float,
        bodies: RigidBodies,
        crystal: Crystal,
        curvature: Tensor,
        configuration: RigidFlowConfiguration | None = None,
    ) -> Self:
        """Return an untrained generator that starts from the harmonic crystal.

        Args:
            particles: all sites.
            temperature: K.
            bodies: the bodies.
            crystal: whose sites are a minimum of the energy.
            curvature: ``(6 M - 3, 6 M - 3)`` second derivatives of the energy there, kJ/mol, by flat crystal
            coordinates (see
                :func:`~flowbridge.flows.rigid.relaxation.relaxed`).
            configuration: of the layers.
        """
        covariance = thermal_energy(temperature) * torch.linalg.inv(curvature.double())
        base = HarmonicBase(torch.zeros(len(curvature), dtype=torch.float64), covariance)
        scales = FluctuationScales.of(base.sample(1000, torch.Generator().manual_seed(0)))
        return cls(particles, temperature, bodies, crystal, base, configuration or RigidFlowConfiguration(), scales)

    @classmethod
    def of_one_body(
        cls,
        particles: Particles,
        temperature: float,
        bodies: RigidBodies,
        position: Tensor,
        configuration: RigidFlowConfiguration | None = None,
    ) -> Self:
        """Return an untrained generator of the orientation of a body whose position ``(3,)`` nm is held."""
        identity = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        crystal = Crystal(torch.as_tensor(position, dtype=torch.float64).reshape(1, 3), identity)
        chosen = configuration or RigidFlowConfiguration(orientations="convex_gradient")
        return cls(particles, temperature, bodies, crystal, UniformBase(), chosen, FluctuationScales(1.0, 1.0))

    def ensemble(self, target: Any) -> Ensemble:
        """Return what to train towards: ``target``, anything :func:`~flowbridge.core.energy.as_batched_energy` takes."""
        temperature = temperature_of(self.metadata)
        return Ensemble(self.crystal, BodyEnergy(self.bodies, as_batched_energy(target)), temperature)

    def coordinates_log_prob(self, coordinates: CrystalCoordinates) -> Tensor:
        """Return log-densities ``(B,)``, float64, of crystal coordinates; differentiable."""
        latent, log_det = self.flow.inverse(coordinates)
        result: Tensor = self.base.log_prob(latent) + log_det
        return result

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of all sites' positions ``(B, N, 3)`` nm; differentiable once."""
        return self.coordinates_log_prob(
            self.crystal.coordinates(self.bodies.configuration(positions, self.crystal.box))
        )

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return ``-kT log p`` ``(B,)`` in kJ/mol; see :meth:`Potential.forward`.

        Raises:
            CoordinateError: when a body is not rigid.
            ConfigurationError: for a cell that is not the crystal's, or global parameters.
        """
        if global_parameters:
            raise ConfigurationError(f"a generator has no global parameters, got {', '.join(global_parameters)}")
        check_cell(self.crystal, cell)
        return -thermal_energy(temperature_of(self.metadata)) * self.log_prob(positions)

    def sample_positions(self, count: int, generator: torch.Generator) -> BodySamples:
        """Draw ``count`` configurations with their log-densities; the first body is on its site."""
        if count < 1:
            raise ConfigurationError(f"the number of samples must be positive, got {count}")
        positions, log_probs = [], []
        with torch.no_grad():
            for start in range(0, count, _CHUNK):
                latent = self.base.sample(min(_CHUNK, count - start), generator)
                value, log_det = self.flow(latent)
                positions.append(self.bodies.places(self.crystal.configuration(value)))
                log_probs.append(self.base.log_prob(latent) - log_det)
        return BodySamples(torch.cat(positions), torch.cat(log_probs))

    def example_positions(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Potential.example_positions`: samples of the flow."""
        return self.sample_positions(count, generator).positions

    def sample(self, count: int, target: Any, seed: int = 0) -> WeightedSamples:
        """Draw weighted samples of the Boltzmann distribution of ``target`` at this generator's temperature.

        Args:
            count: number of samples.
            target: an ``openmm.System``, a Potential, the path of its model file, or any BatchedEnergy, of the same sites.
            seed: of the latent variables.

        Returns:
            Samples with weights ``exp(-U/kT) / p``, unclipped; without a finite energy, 0.
        """
        draws = self.sample_positions(count, torch.Generator().manual_seed(seed))
        positions = draws.positions.numpy()
        energies, _ = as_batched_energy(target).energies_and_forces(positions)
        provenance = {"seed": seed, "count": count, "model_digest": self.model_file.digest if self.model_file else None}
        return weighted(
            positions,
            energies / thermal_energy(temperature_of(self.metadata)),
            -draws.log_prob.numpy(),
            self.metadata,
            provenance,
        )

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Potential.configuration`."""
        base: Literal["uniform", "harmonic"] = "uniform" if isinstance(self.base, UniformBase) else "harmonic"
        return {
            "particles": self.metadata.particles.to_dict(),
            "temperature": self.metadata.temperature,
            "template": self.bodies.template.tolist(),
            "crystal": self.crystal.describe(),
            "base": base,
            "scales": list(self.scales),
            "flow": self.flow_configuration.model_dump(mode="json"),
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Potential.from_configuration`."""
        crystal = Crystal.from_description(configuration["crystal"])
        dimension = flat_dimension(crystal.count)
        base: HarmonicBase | UniformBase = UniformBase()
        if configuration["base"] == "harmonic":
            base = HarmonicBase(torch.zeros(dimension), torch.eye(dimension))
        return cls(
            Particles.from_dict(configuration["particles"]),
            float(configuration["temperature"]),
            RigidBodies(torch.tensor(configuration["template"], dtype=torch.float64), crystal.count),
            crystal,
            base,
            RigidFlowConfiguration.model_validate(configuration["flow"]),
            FluctuationScales(*configuration["scales"]),
        )


def temperature_of(metadata: PotentialMetadata) -> float:
    """Return the temperature in K; raises ConfigurationError where there is none."""
    if metadata.temperature is None:
        raise ConfigurationError("a density of rigid bodies belongs to a temperature, and these metadata have none")
    return metadata.temperature


def check_sizes(particles: Particles, bodies: RigidBodies, crystal: Crystal) -> None:
    """Refuse particles, bodies and crystals that do not belong together."""
    if len(particles) != bodies.count * bodies.sites or crystal.count != bodies.count:
        raise ConfigurationError(
            f"{len(particles)} particles, {bodies.count} bodies of {bodies.sites} sites and a crystal of {crystal.count} do "
            "not belong together"
        )


def check_cell(crystal: Crystal, cell: Tensor | None) -> None:
    """Refuse a cell ``(B, 3, 3)`` nm other than the crystal's box."""
    if cell is None:
        return
    if crystal.box is None:
        raise ConfigurationError("a cell was given to a generator of bodies in the open: leave it out")
    expected = torch.diag(crystal.box).to(cell)
    if cell.shape[-2:] != (3, 3) or not bool(((cell - expected).abs() < 1e-4).all()):
        raise ConfigurationError(
            f"the cell {cell.detach().tolist()} is not the box that the flow was made for, {crystal.box.tolist()} nm: a flow "
            "of a crystal belongs to one volume"
        )


def weighted(
    positions: np.ndarray[Any, np.dtype[np.float64]],
    reduced_target: np.ndarray[Any, np.dtype[np.float64]],
    reduced_generator: np.ndarray[Any, np.dtype[np.float64]],
    metadata: PotentialMetadata,
    provenance: dict[str, Any],
    log_weights: np.ndarray[Any, np.dtype[np.float64]] | float = 0.0,
) -> WeightedSamples:
    """Return samples with weights ``exp(u_generator - u_target)`` times their own; without a finite energy, 0."""
    usable = np.isfinite(reduced_target) & np.isfinite(reduced_generator)
    change = np.where(usable, reduced_generator - np.where(usable, reduced_target, 0.0), -np.inf)
    return WeightedSamples(
        positions,
        change + log_weights,
        metadata.particles,
        temperature_of(metadata),
        {"target": reduced_target, "generator": reduced_generator},
        {**provenance, "without_finite_energy": int((~usable).sum())},
    )
