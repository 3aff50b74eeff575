"""A map of a crystal of rigid bodies from one temperature to another: learned free-energy perturbation."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch

from ...core.energy import as_batched_energy
from ...core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from ...core.model import Model
from ...core.potential import Particles
from ...core.reweighting import Draws, reweight
from ...core.samples import WeightedSamples
from ...core.statistics.bootstrap import FloatArray
from ...core.units import thermal_energy
from .bodies import RigidBodies
from .configuration import RigidFlowConfiguration
from .crystal import Crystal, CrystalCoordinates, RigidBijection, RigidChain, to_flat
from .energies import BodyEnergy
from .generator import check_sizes
from .harmonic import HarmonicMap
from .maps.layers import FluctuationScales, coupling_layers
from .training import Frames
from .works import Ensemble

_CHUNK = 2048


class RigidBodyMap(Model):
    """Carries samples of a crystal at one temperature to another (arXiv 2301.11355), and weights them for it.

    The map starts as the harmonic contraction of all deviations from the crystal by ``sqrt(T_b / T_a)``, on which
    coupling layers of positions and orientations follow. It has no energy of its own and is no potential, since the
    density of what it gives is that of its samples.

    Attributes:
        particles: all sites.
        base_temperature: K of the samples that are carried.
        temperature: K that they are carried to.
    """

    kind: ClassVar[str] = "rigid_body_map"
    description: ClassVar[str] = (
        "a map of rigid bodies from one temperature to another, which has no energy of its own (carry samples with "
        "weighted_samples(), or train a RigidBodyGenerator where a potential is needed)"
    )

    def __init__(
        self,
        particles: Particles,
        temperatures: tuple[float, float],
        bodies: RigidBodies,
        crystal: Crystal,
        harmonic: HarmonicMap,
        configuration: RigidFlowConfiguration,
        scales: FluctuationScales,
    ) -> None:
        super().__init__()
        for temperature in temperatures:
            thermal_energy(temperature)
        check_sizes(particles, bodies, crystal)
        self.particles = particles
        self.base_temperature, self.temperature = temperatures
        self.bodies, self.crystal = bodies, crystal
        self.flow_configuration, self.scales = configuration, scales
        self.flow = RigidChain([harmonic, *coupling_layers(crystal, configuration, scales)])

    @classmethod
    def untrained(
        cls,
        bodies: RigidBodies,
        crystal: Crystal,
        samples: WeightedSamples,
        temperature: float,
        configuration: RigidFlowConfiguration | None = None,
    ) -> Self:
        """Return the harmonic contraction about the sites of ``crystal``, with fresh coupling layers behind.

        Args:
            bodies: the bodies.
            crystal: whose sites are a minimum of the energy (see :func:`~flowbridge.flows.rigid.relaxation.relaxed`).
            samples: of all sites at the base temperature, more than there are coordinates.
            temperature: to map to, K.
            configuration: of the layers.
        """
        chosen = configuration or RigidFlowConfiguration(closed="forward")
        coordinates = crystal.coordinates(
            bodies.configuration(torch.as_tensor(samples.positions).double(), crystal.box)
        )
        flat = to_flat(coordinates)
        factor = (temperature / samples.temperature) ** 0.5
        harmonic = HarmonicMap.contraction(torch.zeros(flat.shape[1], dtype=torch.float64), torch.cov(flat.mT), factor)
        with torch.no_grad():
            scales = FluctuationScales.of(harmonic(coordinates).value)
        return cls(samples.particles, (samples.temperature, temperature), bodies, crystal, harmonic, chosen, scales)

    def coordinates(self, positions: Any) -> CrystalCoordinates:
        """Return crystal coordinates of all sites' positions ``(S, N, 3)`` nm, in the order given."""
        places = torch.as_tensor(np.ascontiguousarray(positions, dtype=np.float64))
        parts = [
            self.crystal.coordinates(self.bodies.configuration(part, self.crystal.box)) for part in places.split(_CHUNK)
        ]
        return CrystalCoordinates(*(torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)))

    def frames(self, samples: WeightedSamples, energy: Any) -> Frames:
        """Return samples of the base, with their reduced potentials, to train with or to carry.

        Args:
            samples: equally weighted samples at the base temperature.
            energy: of the base (see :func:`~flowbridge.core.energy.as_batched_energy`); their reduced potential
            ``"target"`` is
                used where they have it.
        """
        self._check(samples)
        if np.ptp(samples.log_weights) > 0.0:
            raise ConfigurationError("training draws frames evenly: resample the weighted samples first")
        return Frames(self.coordinates(samples.positions), torch.as_tensor(self._reduced_base(samples, energy)))

    def ensemble(self, target: Any) -> Ensemble:
        """Return what to train towards: ``target`` (an energy) at the temperature that is mapped to."""
        return Ensemble(self.crystal, BodyEnergy(self.bodies, as_batched_energy(target)), self.temperature)

    def weighted_samples(self, samples: WeightedSamples, energy: Any, target: Any | None = None) -> WeightedSamples:
        """Carry samples of the base to the other temperature, with weights towards its Boltzmann distribution.

        Args:
            samples: at the base temperature, weighted or not.
            energy: of the base; the samples' reduced potential ``"target"`` is used where they have it.
            target: energy at the other temperature; ``energy`` where None.
        """
        self._check(samples)
        moved, log_det = self.configuration_map().forward(samples.positions)
        # Where the map spreads samples out, their density falls.
        log_prob = -(self._reduced_base(samples, energy) + log_det)
        return reweight(
            Draws(torch.as_tensor(moved), torch.as_tensor(log_prob)),
            energy if target is None else target,
            self.particles,
            self.temperature,
            log_weights=samples.log_weights,
            provenance={
                "carried_from_kelvin": samples.temperature,
                "model_digest": self.model_file.digest if self.model_file else None,
                "samples": dict(samples.provenance),
            },
        )

    def configuration_map(self) -> PositionMap:
        """Return the map of positions, for :func:`~flowbridge.core.statistics.targeted_free_energy.targeted_free_energy`."""
        return PositionMap(self)

    def _check(self, samples: WeightedSamples) -> None:
        if samples.particles.names != self.particles.names:
            raise MoleculeMismatchError("the samples are of other particles than the map")
        if abs(samples.temperature - self.base_temperature) > 1e-6:
            raise ConfigurationError(
                f"the map starts at {self.base_temperature} K, the samples are at {samples.temperature} K"
            )

    def _reduced_base(self, samples: WeightedSamples, energy: Any) -> FloatArray:
        reduced = samples.reduced_potentials.get("target")
        if reduced is None:
            energies = as_batched_energy(energy).energies(samples.positions.astype(np.float64))
            reduced = energies / thermal_energy(samples.temperature)
        broken = ~np.isfinite(reduced) & (samples.log_weights > -np.inf)
        if broken.any():
            raise NonFiniteEnergyError(
                f"{int(broken.sum())} samples have no finite energy at {samples.temperature} K, the first at index "
                f"{int(np.argmax(broken))}: are they samples of this crystal?"
            )
        return np.asarray(reduced, dtype=np.float64)

    def header_metadata(self) -> dict[str, Any]:
        """See :meth:`Model.header_metadata`."""
        periodic = self.crystal.box is not None
        return {"particles": self.particles.to_dict(), "temperature": self.temperature, "periodic": periodic}

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
        return {
            "particles": self.particles.to_dict(),
            "temperatures": [self.base_temperature, self.temperature],
            "template": self.bodies.template.tolist(),
            "crystal": self.crystal.describe(),
            "scales": list(self.scales),
            "flow": self.flow_configuration.model_dump(mode="json"),
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Model.from_configuration`."""
        crystal = Crystal.from_description(configuration["crystal"])
        base, temperature = (float(value) for value in configuration["temperatures"])
        return cls(
            Particles.from_dict(configuration["particles"]),
            (base, temperature),
            RigidBodies(torch.tensor(configuration["template"], dtype=torch.float64), crystal.count),
            crystal,
            HarmonicMap.untrained(crystal.count),
            RigidFlowConfiguration.model_validate(configuration["flow"]),
            FluctuationScales(*configuration["scales"]),
        )


class PositionMap:
    """The map on positions of all sites: a :class:`~flowbridge.core.statistics.targeted_free_energy.ConfigurationMap`.

    Determinants are by the volume element of rigid bodies, positions relative to the first body and shares of
    orientations. The first body stays where it is.
    """

    def __init__(self, model: RigidBodyMap) -> None:
        self.model = model

    def forward(self, positions: Any) -> tuple[FloatArray, FloatArray]:
        """Return positions ``(S, N, 3)`` nm at the other temperature, and log-determinants ``(S,)``."""
        return self._mapped(positions, inverse=False)

    def inverse(self, positions: Any) -> tuple[FloatArray, FloatArray]:
        """Undo :meth:`forward`."""
        return self._mapped(positions, inverse=True)

    def _mapped(self, positions: Any, *, inverse: bool) -> tuple[FloatArray, FloatArray]:
        model = self.model
        moved, log_dets = [], []
        with torch.no_grad():
            for part in torch.as_tensor(np.ascontiguousarray(positions, dtype=np.float64)).split(_CHUNK):
                configuration = model.bodies.configuration(part, model.crystal.box)
                flow: RigidBijection = model.flow
                coordinates = model.crystal.coordinates(configuration)
                value, log_det = flow.inverse(coordinates) if inverse else flow(coordinates)
                placed = model.crystal.configuration(value, configuration.positions[:, 0])
                moved.append(model.bodies.places(placed))
                log_dets.append(log_det)
        return torch.cat(moved).numpy(), torch.cat(log_dets).double().numpy()
