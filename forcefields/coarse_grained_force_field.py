"""A coarse-grained force field: a prior in closed form plus a network, as a Potential like any other."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.potential import Particles, Potential, PotentialMetadata
from ..core.units import thermal_energy
from .networks.graph_network import GraphConfiguration, GraphNetwork
from .networks.invariant_network import InvariantConfiguration, InvariantNetwork, build_network
from .prior_terms import PriorEnergy

_REVISION = 1  # of the meaning of stored parameters
_EXAMPLES = 32  # frames kept with the model, to compile and check it with
_SHAKEN = 0.002  # nm


class Strain(NamedTuple):
    """The bead of a configuration with the largest force, and the term of the energy that contributes most to it."""

    bead: int
    force: float
    term: str


class CoarseGrainedForceField(Potential):
    """``U(R) = prior(R) + kT network(R)``, a potential of mean force at one temperature (kJ/mol, nm).

    Args:
        beads: the particles; from :class:`~flowbridge.forcefields.beads.mappings.Mapping`.
        temperature: K.
        prior: terms in closed form.
        configuration: configuration of the network; None for the prior alone; or a network, a module from positions
            ``(B, n, 3)`` nm to energies ``(B,)`` in kT (see
            :class:`~flowbridge.integrations.external_networks.ExternalNetwork`). That one cannot be kept in a model file.
        examples: frames ``(32, n, 3)`` nm, representative of those the model is used on.
    """

    kind: ClassVar[str] = "coarse_grained_force_field"
    description: ClassVar[str] = "a coarse-grained force field of one molecule"
    examples: Tensor

    def __init__(
        self,
        beads: Particles,
        temperature: float,
        prior: PriorEnergy,
        configuration: InvariantConfiguration | GraphConfiguration | nn.Module | None,
        examples: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(prior.metadata.particles) != len(beads):
            raise ConfigurationError(
                f"the prior is of {len(prior.metadata.particles)} beads, the force field of {len(beads)}"
            )
        self.metadata = PotentialMetadata(beads, periodic=False, temperature=temperature)
        self.prior = prior
        self.network_configuration = None if isinstance(configuration, nn.Module) else configuration
        self.network: nn.Module | None
        if configuration is None or isinstance(configuration, nn.Module):
            self.network = configuration
        else:
            self.network = build_network(beads, configuration)
        self.register_buffer("examples", torch.zeros(_EXAMPLES, len(beads), 3, dtype=torch.float64))
        if examples is not None:
            self.set_examples(examples)

    @classmethod
    def untrained(
        cls,
        prior: PriorEnergy,
        configuration: InvariantConfiguration | GraphConfiguration | nn.Module,
        temperature: float,
        positions: Tensor,
        weights: Tensor | None = None,
    ) -> Self:
        """Return a force field with a fresh network whose features are standardised on frames ``(F, n, 3)`` nm.

        Args:
            prior: fitted to the same frames; see :func:`~flowbridge.forcefields.prior_statistics.fit_prior`.
            configuration: configuration of the network, or a network.
            temperature: temperature of the frames in K.
            positions: the frames.
            weights: weights of the frames ``(F,)``; None for equal ones.
        """
        force_field = cls(prior.metadata.particles, temperature, prior, configuration, positions)
        equal = torch.ones(len(positions), dtype=torch.float64) if weights is None else weights.double()
        if isinstance(force_field.network, InvariantNetwork):
            force_field.network.features.fit(positions, equal / equal.sum())
        return force_field

    def set_examples(self, positions: Tensor) -> None:
        """Keep an even choice of frames ``(F, n, 3)`` as examples."""
        chosen = torch.linspace(0, len(positions) - 1, _EXAMPLES).round().long()
        self.examples.copy_(positions[chosen].double())

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol; see :meth:`Potential.forward`. There is no periodic box."""
        self.check_arguments(cell, global_parameters)
        energy: Tensor = self.prior(positions)
        if self.network is None:
            return energy
        return energy + self.network_energy(positions)

    def network_energy(self, positions: Tensor) -> Tensor:
        """Return the network's part ``(B,)`` in kJ/mol, float64."""
        if self.network is None:
            return positions.new_zeros(len(positions), dtype=torch.float64)
        dtype = next(self.network.parameters()).dtype
        value: Tensor = self.network(positions.to(dtype))
        return thermal_energy(self._temperature) * value.double()

    def transferred(self, prior: PriorEnergy, positions: Tensor) -> Self:
        """Return the force field of another sequence: this graph network's parameters, with the other's prior.

        Args:
            prior: prior of the other sequence's beads.
            positions: frames ``(F, n, 3)`` nm of them, kept as examples.

        Raises:
            ConfigurationError: when the network belongs to one sequence, or does not know the types of the other's beads.
        """
        if not isinstance(self.network, GraphNetwork) or not isinstance(self.network_configuration, GraphConfiguration):
            raise ConfigurationError("only a graph network serves other sequences: train one with kind = 'graph'")
        known = self.network_configuration.model_copy(update={"vocabulary": self.network.vocabulary})
        other = type(self)(prior.metadata.particles, self._temperature, prior, known, positions)
        if other.network is not None:
            parameters = self.network.state_dict()
            other.network.to(next(iter(parameters.values())).dtype).load_state_dict(parameters)
        return other.eval()

    @property
    def bounded_layers(self) -> list[nn.Linear]:
        """Layers of the network whose spectral norm stays below :attr:`lipschitz`."""
        return self.network.bounded_layers if isinstance(self.network, InvariantNetwork) else []

    @property
    def standardisation(self) -> tuple[Tensor, ...]:
        """Mean and deviation of the network's features; nothing where it has none."""
        if not isinstance(self.network, InvariantNetwork):
            return ()
        return self.network.features.mean, self.network.features.deviation

    @property
    def lipschitz(self) -> float:
        """The bound; infinite where there is none."""
        bound = self.network.lipschitz if isinstance(self.network, InvariantNetwork) else None
        return math.inf if bound is None else bound

    def network_only(self) -> Self:
        """Return the force field without its prior, whose terms an engine computes natively; parameters are shared."""
        bare = type(self)(
            self.metadata.particles, self._temperature, PriorEnergy(self.metadata.particles, [], self._temperature),
            self.network_configuration, self.examples,
        )  # fmt: skip
        bare.network = self.network
        return bare

    def worst_strain(self, positions: Tensor) -> Strain:
        """Return the bead of a configuration ``(n, 3)`` with the largest force, and the term of the energy that causes it."""
        with torch.enable_grad():
            leaf = positions.detach().double()[None].requires_grad_(True)
            parts = {term.kind: term(leaf).sum() for term in self.prior.prior_terms}
            parts["network"] = self.network_energy(leaf).sum()
            forces = {
                name: -torch.autograd.grad(part, leaf, allow_unused=True, materialize_grads=True)[0][0]
                for name, part in parts.items()
                if part.requires_grad
            }
        total = torch.nan_to_num(sum(forces.values(), torch.zeros_like(leaf[0])), nan=float("inf")).norm(dim=-1)
        bead = int(total.argmax())
        sizes = {name: float(torch.nan_to_num(force[bead], nan=float("inf")).norm()) for name, force in forces.items()}
        return Strain(bead, float(total[bead]), max(sizes, key=lambda name: sizes[name]))

    def describe_strain(self, positions: Tensor) -> str:
        worst = self.worst_strain(positions)
        return (
            f"the largest force, {worst.force:.3g} kJ/mol/nm, is on bead {self.metadata.particles.label(worst.bead)}, from "
            f"the term {worst.term!r}"
        )

    def example_positions(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Potential.example_positions`: training frames, slightly shaken."""
        frames = self.examples[torch.randint(len(self.examples), (count,), generator=generator)].cpu()
        return frames + _SHAKEN * torch.randn(frames.shape, generator=generator, dtype=torch.float64)

    @property
    def _temperature(self) -> float:
        temperature = self.metadata.temperature
        if temperature is None:
            raise ConfigurationError("this force field has no temperature, so its network has no energy scale")
        return temperature

    def configuration(self) -> dict[str, Any]:
        """Return particles, temperature, prior and the network's sizes, ready for JSON; see :meth:`Model.configuration`."""
        network = self.network_configuration
        if network is None and self.network is not None:
            raise ConfigurationError(
                f"the force field holds a {type(self.network).__name__} of another library, and a model file holds no code of "
                "other libraries: keep its state_dict() and build it again from that"
            )
        return {
            "revision": _REVISION,
            "temperature": self.metadata.temperature,
            "prior": self.prior.configuration(),
            "network": None if network is None else network.model_dump(mode="json"),
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """Build an untrained force field of :meth:`configuration`; raises ConfigurationError for another revision."""
        if configuration.get("revision") != _REVISION:
            raise ConfigurationError(
                f"the force field was stored in revision {configuration.get('revision')} of its parameters, this "
                f"flowbridge reads revision {_REVISION}: train it again, or use the version that the file names"
            )
        prior = PriorEnergy.from_configuration(configuration["prior"])
        stored = configuration["network"]
        network = None if stored is None else _NETWORKS.validate_python(stored)
        return cls(prior.metadata.particles, float(configuration["temperature"]), prior, network)


_NETWORKS: TypeAdapter[InvariantConfiguration | GraphConfiguration] = TypeAdapter(
    InvariantConfiguration | GraphConfiguration
)
