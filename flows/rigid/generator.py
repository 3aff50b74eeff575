"""A density of rigid bodies: their Boltzmann generator, and at the same time an energy function."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ...core.energy import as_batched_energy
from ...core.errors import ConfigurationError
from ...core.generator import GeneratorPotential
from ...core.potential import Particles, PotentialMetadata
from ...core.reweighting import Draws
from ...core.units import thermal_energy
from .bodies import RigidBodies
from .configuration import RigidFlowConfiguration
from .crystal import Crystal, CrystalCoordinates, RigidChain
from .energies import BodyEnergy
from .harmonic import HarmonicBase, UniformBase, flat_dimension
from .maps.layers import FluctuationScales, coupling_layers
from .works import Ensemble

_CHUNK = 4096  # configurations at once


class RigidBodyGenerator(GeneratorPotential):
    """A flow of rigid bodies from a base with a density: a harmonic crystal, or for a single body all orientations alike.

    ``log_prob`` is the density of the positions of the bodies relative to the first (per nm^3 each) and of all
    orientations (by shares of all orientations); as a Potential its energy is ``-kT log p``. Samples need no
    simulation, and their weights give the absolute free energy of the crystal.
    """

    kind: ClassVar[str] = "rigid_body_generator"
    description: ClassVar[str] = "a generator of rigid bodies"

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
        return Ensemble(self.crystal, BodyEnergy(self.bodies, as_batched_energy(target)), self.temperature)

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

    def check_arguments(self, cell: Tensor | None, global_parameters: dict[str, float]) -> None:
        """Refuse global parameters, and a cell ``(B, 3, 3)`` nm that is not the crystal's."""
        if global_parameters:
            raise ConfigurationError(f"a generator has no global parameters, got {', '.join(global_parameters)}")
        check_cell(self.crystal, cell)

    def sample_positions(self, count: int, generator: torch.Generator) -> Draws:
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
        return Draws(torch.cat(positions), torch.cat(log_probs))

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
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
        """See :meth:`Model.from_configuration`."""
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
