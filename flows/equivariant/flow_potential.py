"""An equivariant flow as an energy function: the density of a cluster of particles in simulators' units."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.errors import ConfigurationError
from ...core.generator import GeneratorPotential
from ...core.model_files.files import register_kind
from ...core.potential import Particles, PotentialMetadata
from ...core.reweighting import Draws
from ...core.units import thermal_energy
from .continuous_flow import ContinuousFlow
from .fields.graph_field import GraphField, GraphFieldSettings
from .fields.kernel_field import KernelField, KernelFieldSettings
from .fields.network_field import NetworkField, NetworkFieldSettings
from .fields.vector_fields import VectorField
from .mean_free import MeanFreeNormal
from .ordinary_equations import Solver
from .systems import ParticleSystem

_REVISION = 2  # of the meaning of stored parameters: raise it when the same tensors would give another density

FieldSettings: TypeAlias = GraphFieldSettings | KernelFieldSettings | NetworkFieldSettings
"""Settings decide the field: a graph network, kernel dynamics, or a network without symmetry."""

_FIELDS: dict[str, tuple[type[FieldSettings], Any]] = {
    "graph": (GraphFieldSettings, GraphField),
    "kernel": (KernelFieldSettings, KernelField),
    "network": (NetworkFieldSettings, NetworkField),
}


@register_kind
class EquivariantFlow(GeneratorPotential):
    """A continuous flow of identical particles, with the energy ``-kT log p`` (arXiv 2006.02425, 2306.15030).

    The flow works in reduced lengths: positions in nm are divided by ``length``, and the density per ``nm^((N-1) D)`` on the
    configurations without their centre is ``p(x / length) / length^((N-1) D)``. In two dimensions it reads x and y, and
    leaves z alone. Forces are exact derivatives of the solver's steps, so dynamics conserves the energy that is reported.

    Args:
        particles: N identical particles.
        dimension: D, 2 or 3.
        scale: standard deviation of the prior in reduced lengths.
        field: settings of the velocity field.
        solver: how the equation is solved.
        length: nm that one reduced length stands for.
        temperature: K.
        seed: of the untrained parameters.
    """

    kind: ClassVar[str] = "equivariant_flow"
    description: ClassVar[str] = "an equivariant flow of an open cluster"
    one_program: ClassVar[bool] = False  # a step of the solver with its derivative is 2000 operations

    def __init__(
        self,
        particles: Particles,
        dimension: int,
        scale: float,
        field: FieldSettings,
        solver: Solver | None = None,
        *,
        length: float = 1.0,
        temperature: float = 300.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dimension not in (2, 3):
            raise ConfigurationError(f"particles live in 2 or 3 dimensions, got {dimension}")
        if not 0.0 < length < math.inf:
            raise ConfigurationError(f"the reduced length must be positive (nm), got {length}")
        thermal_energy(temperature)
        kinds = set(zip(particles.atomic_numbers, particles.masses, strict=True))
        if len(kinds) != 1:
            raise ConfigurationError(
                "the flow permutes its particles, so they must be identical; these have the elements and masses "
                f"{sorted(kinds)}"
            )
        self.metadata = PotentialMetadata(particles, temperature=float(temperature))
        self.length, self.dimension = length, dimension
        self.field_settings = field
        made = _made(field, len(particles), dimension, torch.Generator().manual_seed(seed))
        self.flow = ContinuousFlow(MeanFreeNormal(len(particles), dimension, scale), made, solver)

    @classmethod
    def untrained(
        cls, system: ParticleSystem, samples: Tensor, field: FieldSettings, solver: Solver | None = None, seed: int = 0
    ) -> Self:
        """Return a flow for a system, its prior as wide as samples ``(S, N, D)`` in reduced lengths."""
        centred = samples - samples.mean(1, keepdim=True)
        scale = math.sqrt(float(centred.square().sum((1, 2)).mean()) / system.degrees_of_freedom)
        temperature = system.metadata.temperature or 300.0
        return cls(
            system.metadata.particles, system.dimension, scale, field, solver,
            length=system.length, temperature=temperature, seed=seed,
        )  # fmt: skip

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of positions ``(B, N, 3)`` in nm (density per nm^((N-1) D))."""
        reduced = positions[..., : self.dimension] / self.length
        return self.flow.log_prob(reduced) - self._log_volume

    def sample_positions(self, count: int, generator: torch.Generator) -> Draws:
        """Draw ``count`` configurations ``(S, N, 3)`` in nm with their log-densities; centred at the origin."""
        value, log_prob = self.flow.draw(count, generator)
        return Draws(pad(self.length * value.double(), (0, 3 - self.dimension)), log_prob - self._log_volume)

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
        return {
            "revision": _REVISION,
            "particles": self.metadata.particles.to_dict(),
            "dimension": self.dimension,
            "scale": self.flow.prior.scale,
            "field": {"kind": _name(self.field_settings), "settings": self.field_settings.model_dump(mode="json")},
            "solver": self.flow.solver.model_dump(mode="json"),
            "length": self.length,
            "temperature": self.temperature,
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Model.from_configuration`."""
        if configuration.get("revision") != _REVISION:
            raise ConfigurationError(
                f"the flow was stored in revision {configuration.get('revision')} of its parameters, this flowbridge reads "
                f"revision {_REVISION}: train it again, or use the version that the file names"
            )
        name = configuration["field"]["kind"]
        if name not in _FIELDS:
            raise ConfigurationError(f"a velocity field is one of {', '.join(_FIELDS)}, the file names {name!r}")
        settings = _FIELDS[name][0].model_validate(configuration["field"]["settings"])
        return cls(
            Particles.from_dict(configuration["particles"]),
            int(configuration["dimension"]),
            float(configuration["scale"]),
            settings,
            Solver.model_validate(configuration["solver"]),
            length=float(configuration["length"]),
            temperature=float(configuration["temperature"]),
        )

    @property
    def _log_volume(self) -> float:
        return self.flow.prior.degrees_of_freedom * math.log(self.length)


def _name(settings: FieldSettings) -> str:
    return next(name for name, (cls, _) in _FIELDS.items() if isinstance(settings, cls))


def _made(settings: FieldSettings, count: int, dimension: int, generator: torch.Generator) -> VectorField:
    field: VectorField = _FIELDS[_name(settings)][1](count, dimension, settings, generator)
    return field
