"""Particles with a pair energy in reduced units: the benchmark systems of equivariant flows.

A reduced energy is in kT. As a Potential a system has a length in nm and a temperature in K, so that
``U = kT u(x / length)`` in kJ/mol. A system of two dimensions reads x and y of each position, and pulls nothing along z.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.model_files.files import register_kind
from ...core.potential import EnergyAndForces, Particles, Potential, PotentialMetadata
from ...core.units import thermal_energy


class PairTerm(NamedTuple):
    """Energies of pairs in kT and their derivatives by the distance, both of the shape of the distances."""

    energy: Tensor
    derivative: Tensor


class ReducedEnergy(NamedTuple):
    """Energies ``(B,)`` in kT and gradients ``(B, N, D)`` in kT per reduced length."""

    energy: Tensor
    gradient: Tensor


def argon_like(count: int) -> Particles:
    """Return ``count`` particles with the name, the element and the mass of argon, without bonds."""
    if count < 2:
        raise ConfigurationError(f"a system of particles has at least two of them, got {count}")
    return Particles(names=("Ar",) * count, atomic_numbers=(18,) * count, masses=(39.948,) * count)


class ParticleSystem(Potential):
    """Identical particles in ``dimension`` dimensions with a radial pair energy and a harmonic tie to their centre.

    The energy is ``sum over pairs of pair_term(d) + oscillator / 2 sum_i |x_i - mean x|^2``, in kT.

    Args:
        count: particles N.
        dimension: D, 2 or 3.
        oscillator: strength of the tie to the centre, kT per squared reduced length.
        length: nm that one reduced length stands for.
        temperature: K at which kT is the unit of energy.
    """

    description: ClassVar[str] = "an open system of particles"
    first: Tensor
    second: Tensor
    incidence: Tensor

    def __init__(self, count: int, dimension: int, oscillator: float, length: float, temperature: float) -> None:
        super().__init__()
        if dimension not in (2, 3):
            raise ConfigurationError(f"particles live in 2 or 3 dimensions, got {dimension}")
        if not length > 0.0:
            raise ConfigurationError(f"the reduced length must be positive (nm), got {length}")
        thermal_energy(temperature)
        self.metadata = PotentialMetadata(argon_like(count), temperature=float(temperature))
        self.count, self.dimension, self.oscillator, self.length = count, dimension, oscillator, length
        first, second = torch.triu_indices(count, count, 1)
        incidence = torch.zeros(len(first), count, dtype=torch.float64)
        incidence[torch.arange(len(first)), first] = 1.0
        incidence[torch.arange(len(first)), second] = -1.0
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.register_buffer("incidence", incidence, persistent=False)

    @property
    def degrees_of_freedom(self) -> int:
        """Dimension of the configurations without their centre, ``(N - 1) D``."""
        return (self.count - 1) * self.dimension

    def pair_term(self, distance: Tensor) -> PairTerm:
        """Return the energy of pairs at reduced distances."""
        raise TypeError(f"{type(self).__name__} defines no pair_term(distance)")

    def reduced_energy(self, x: Tensor) -> Tensor:
        """Return energies ``(B,)`` in kT of reduced positions ``(B, N, D)``; differentiable."""
        self._check(x)
        distance = (x[:, self.first] - x[:, self.second]).norm(dim=-1)
        centred = x - x.mean(1, keepdim=True)
        return self.pair_term(distance).energy.sum(1) + 0.5 * self.oscillator * centred.square().sum((1, 2))

    def reduced_energy_and_gradient(self, x: Tensor) -> ReducedEnergy:
        """Return energies and gradients in closed form, detached; ``x`` is ``(B, N, D)`` in reduced lengths."""
        self._check(x)
        with torch.no_grad():
            difference = x[:, self.first] - x[:, self.second]
            distance = difference.norm(dim=-1)
            pair = self.pair_term(distance)
            centred = x - x.mean(1, keepdim=True)
            pull = (pair.derivative / distance).unsqueeze(-1) * difference
            gradient = torch.einsum("pn,bpd->bnd", self.incidence.to(x.dtype), pull) + self.oscillator * centred
            return ReducedEnergy(pair.energy.sum(1) + 0.5 * self.oscillator * centred.square().sum((1, 2)), gradient)

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol of positions ``(B, N, 3)`` in nm; see :meth:`Potential.forward`."""
        return self._kt * self.reduced_energy(self._reduced(positions, cell, global_parameters)).double()

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """See :meth:`Potential.energy_and_forces`; in closed form."""
        energy, gradient = self.reduced_energy_and_gradient(self._reduced(positions, cell, global_parameters))
        forces = torch.nn.functional.pad(-self._kt / self.length * gradient, (0, 3 - self.dimension))
        return EnergyAndForces(self._kt * energy.double(), forces)

    @property
    def _kt(self) -> float:
        temperature = self.metadata.temperature
        if temperature is None:
            raise ConfigurationError("a system in reduced units needs a temperature")
        return thermal_energy(temperature)

    def _reduced(self, positions: Tensor, cell: Tensor | None, parameters: dict[str, float]) -> Tensor:
        self.check_arguments(cell, parameters)
        return positions[..., : self.dimension] / self.length

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.count, self.dimension):
            raise ValueError(
                f"positions of this system are (batch, {self.count}, {self.dimension}) in reduced lengths, "
                f"got {tuple(x.shape)}"
            )


@register_kind
class DoubleWellParticles(ParticleSystem):
    """Particles in the plane, each pair of which prefers two distances; with four of them, DW4 (arXiv 2006.02425).

    ``u = sum over pairs of a (d - d0) + b (d - d0)^2 + c (d - d0)^4``, each pair once.
    """

    kind: ClassVar[str] = "double_well_particles"

    def __init__(
        self,
        count: int = 4,
        *,
        a: float = 0.0,
        b: float = -4.0,
        c: float = 0.9,
        d0: float = 4.0,
        length: float = 0.1,
        temperature: float = 300.0,
    ) -> None:
        super().__init__(count, 2, 0.0, length, temperature)
        if not c > 0.0:
            raise ConfigurationError(f"the quartic coefficient c must be positive to keep pairs together, got {c}")
        self.a, self.b, self.c, self.d0 = a, b, c, d0

    def pair_term(self, distance: Tensor) -> PairTerm:
        s = distance - self.d0
        energy = s * (self.a + s * (self.b + self.c * s.square()))
        return PairTerm(energy, self.a + s * (2.0 * self.b + 4.0 * self.c * s.square()))

    def configuration(self) -> dict[str, Any]:
        return {
            "count": self.count, "a": self.a, "b": self.b, "c": self.c, "d0": self.d0,
            "length": self.length, "temperature": self.metadata.temperature,
        }  # fmt: skip

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        return cls(**configuration)


@register_kind
class LennardJonesCluster(ParticleSystem):
    """Lennard-Jones particles tied to their centre: LJ13 and LJ55 (arXiv 2006.02425).

    ``u = times_counted epsilon sum over pairs of [(rm / d)^12 - 2 (rm / d)^6] + oscillator / 2 sum_i |x_i - mean x|^2``.

    Published numbers come in two conventions. The public data of LJ13 and LJ55 (arXiv 2306.15030, 2402.06121) count each pair
    twice, ``times_counted=2``, which is the default; arXiv 2308.10364 counts it once. Their entropies differ by tens of nats.
    """

    kind: ClassVar[str] = "lennard_jones_cluster"

    def __init__(
        self,
        count: int = 13,
        *,
        epsilon: float = 1.0,
        rm: float = 1.0,
        times_counted: int = 2,
        oscillator: float = 1.0,
        length: float = 0.38,
        temperature: float = 300.0,
    ) -> None:
        super().__init__(count, 3, oscillator, length, temperature)
        if times_counted not in (1, 2):
            raise ConfigurationError(f"a pair is counted once or twice, got times_counted={times_counted}")
        if not oscillator > 0.0:
            raise ConfigurationError(f"without a tie to the centre the cluster evaporates, got oscillator={oscillator}")
        self.epsilon, self.rm, self.times_counted = epsilon, rm, times_counted

    def pair_term(self, distance: Tensor) -> PairTerm:
        sixth = (self.rm / distance) ** 6
        strength = self.times_counted * self.epsilon
        return PairTerm(
            strength * (sixth.square() - 2.0 * sixth), 12.0 * strength * (sixth - sixth.square()) / distance
        )

    def configuration(self) -> dict[str, Any]:
        return {
            "count": self.count, "epsilon": self.epsilon, "rm": self.rm, "times_counted": self.times_counted,
            "oscillator": self.oscillator, "length": self.length, "temperature": self.metadata.temperature,
        }  # fmt: skip

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        return cls(**configuration)
