"""The teacher of flow-matching: a smooth flow of bead coordinates together with auxiliary Gaussian variables.

Koehler et al., J. Chem. Theory Comput. 19, 942 (2023), arXiv 2203.11167. The flow has a density p(R, eta) of bead
configurations R and auxiliary variables eta that are independent standard normal in the data. Auxiliary variables carry
information past the layers of torsions, which makes the flow more expressive than its torsions alone allow. The marginal
density of R is not known, but its mean force is, as an average: at samples (R, eta) of the flow, ``kT grad_R log p(R,
eta)`` averages at fixed R to the force of the marginal, so that regression on it learns the marginal's force.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ...core.units import thermal_energy
from ...flows.boltzmann.configuration import FlowConfiguration, StiffChainConfiguration
from ...flows.boltzmann.coordinate_flow import CircleShift, CoordinateFlow
from ...flows.boltzmann.molecule_coordinates import Coordinates, MoleculeCoordinates
from ...flows.transforms.bumps import CircularBumps
from ...flows.transforms.conditioners import Conditioner, FourierFeatures
from ...flows.transforms.couplings import Coupling
from ...flows.transforms.sinh_arcsinh import Affine

_CHUNK = 4096


class TeacherConfiguration(StrictModel):
    """The flow that learns the density of bead configurations.

    Attributes:
        auxiliary: number of auxiliary variables, 2 in the paper. 0 for a plain flow, whose density is known: its forces are
            those of that density and have no noise.
        blocks: each transforms the auxiliary variables and both halves of the torsions once.
        components: bumps of a torsion's mixture.
        hidden: widths of the conditioners' hidden layers.
        harmonics: conditioners see cos and sin of k times each torsion, k = 1 .. harmonics.
        minimum_width: smallest support of a bump, in turns: bounds how sharp forces are.
        stiff: the flow of bonds and angles, conditioned on the torsions.
        seed: random seed of the initial parameters.
    """

    auxiliary: NonNegativeInt = 0
    blocks: PositiveInt = 3
    components: PositiveInt = 10
    hidden: tuple[PositiveInt, ...] = (64, 64)
    harmonics: PositiveInt = 3
    minimum_width: float = Field(default=0.06, gt=0.0, lt=1.0)
    stiff: StiffChainConfiguration = Field(
        default_factory=lambda: StiffChainConfiguration(couplings=4, hidden=(64, 64))
    )
    seed: int = 0

    def flow(self) -> FlowConfiguration:
        """Return what the coordinates and the stiff chain are built from; all torsions of beads are circular."""
        return FlowConfiguration(circular="all", stiff=self.stiff, seed=self.seed)


class TeacherSamples(NamedTuple):
    """Positions ``(S, n, 3)`` nm, joint forces ``(S, n, 3)`` kJ/mol/nm, and the log-ratios of :class:`Proposals`, float64."""

    positions: Tensor
    forces: Tensor
    log_ratio: Tensor


class Proposals(NamedTuple):
    """Positions ``(S, n, 3)`` nm, and ``log p(R, eta) - log N(eta)`` ``(S,)`` of the draw that each came from, float64.

    Under weights ``exp(-U(R)/kT)`` over the exponential of that, averages are those of the Boltzmann distribution of U: the
    auxiliary variables of the target are standard normal and drop out.
    """

    positions: Tensor
    log_ratio: Tensor


class _AugmentedBlock(nn.Module):
    """Auxiliary variables given the torsions, then each half of the torsions given the other half and the auxiliary ones."""

    def __init__(
        self, torsions: int, halves: list[list[int]], settings: TeacherConfiguration, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.features = FourierFeatures(torsions, settings.harmonics)
        self.affine = Affine()
        start = torch.zeros(settings.auxiliary, self.affine.parameter_count)
        self.auxiliary = Conditioner(
            self.features.count, settings.hidden, start, generator, parameters_apart=self.affine.parameters_apart
        ) if settings.auxiliary else None  # fmt: skip
        layers: list[nn.Module] = []
        for number, transformed in enumerate(halves):
            seen = halves[1 - number] if len(halves) == 2 else []
            encoder = FourierFeatures(len(seen), settings.harmonics)
            transform = CircularBumps(settings.components, minimum_width=settings.minimum_width, learn_steepness=True)
            layers.append(
                Coupling(
                    torsions, transformed, transform, settings.hidden, generator, conditioning=seen, encoder=encoder,
                    features=encoder.count, context=settings.auxiliary, wrap=True,
                )
            )  # fmt: skip
        self.couplings = nn.ModuleList(layers)
        self.shift = CircleShift(torsions, generator)

    def inverse(self, turns: Tensor, auxiliary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map data to latent: torsions ``(B, T)`` in turns, auxiliary variables ``(B, A)``; and give the log-determinant."""
        log_det = turns.new_zeros(len(turns))
        turns, _ = self.shift.inverse(turns)
        for coupling in reversed(self.couplings):
            turns, change = coupling.inverse(turns, auxiliary)  # type: ignore[operator]
            log_det = log_det + change
        if self.auxiliary is not None:
            auxiliary, slopes = self.affine.inverse(auxiliary, self.auxiliary(self.features(turns)))
            log_det = log_det + slopes.sum(-1)
        return turns, auxiliary, log_det

    def forward(self, turns: Tensor, auxiliary: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to data."""
        if self.auxiliary is not None:
            auxiliary, _ = self.affine.forward(auxiliary, self.auxiliary(self.features(turns)))
        for coupling in self.couplings:
            turns, _ = coupling(turns, auxiliary)
        turns, _ = self.shift(turns)
        return turns, auxiliary


class AugmentedFlow(nn.Module):
    """Density of bead configurations and auxiliary variables; data -> latent is closed form.

    Args:
        coordinates: fixed map from positions to internal coordinates.
        configuration: sizes.
    """

    def __init__(self, coordinates: MoleculeCoordinates, configuration: TeacherConfiguration) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(configuration.seed)
        self.configuration = configuration
        torsions = len(coordinates.layout.circular)
        if not torsions:
            raise ConfigurationError("flow-matching needs at least four beads in a chain: there is no torsion to learn")
        blocks = []
        for _ in range(configuration.blocks):
            order = torch.randperm(torsions, generator=generator).tolist()
            halves = [sorted(order[: torsions // 2]), sorted(order[torsions // 2 :])] if torsions > 1 else [order]
            blocks.append(_AugmentedBlock(torsions, halves, configuration, generator))
        self.blocks = nn.ModuleList(blocks)
        whole = CoordinateFlow(coordinates, configuration.flow())
        self.stiff, self.features = whole.stiff, whole.features
        self.uniform_base, self.stiff_dimension, self.torsions = whole.uniform_base, whole.stiff_dimension, torsions

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks."""
        return next(self.parameters()).dtype

    def log_prob(self, coordinates: Coordinates, auxiliary: Tensor) -> Tensor:
        """Return log p(coordinates, auxiliary) ``(B,)`` in the network's dtype."""
        turns, stiff, auxiliary = (part.to(self.dtype) for part in (*coordinates, auxiliary))
        rest, log_det = self.stiff.inverse(stiff, self.features(turns))
        for block in reversed(self.blocks):
            turns, auxiliary, change = block.inverse(turns, auxiliary)  # type: ignore[operator]
            log_det = log_det + change
        normal = auxiliary if self.uniform_base else torch.cat([auxiliary, rest], dim=-1)
        return log_det - 0.5 * normal.square().sum(-1) - 0.5 * normal.shape[-1] * math.log(2.0 * math.pi)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Coordinates, Tensor]:
        """Draw coordinates and auxiliary variables."""
        with torch.no_grad():
            turns = torch.rand(count, self.torsions, generator=generator, dtype=self.dtype)
            draw = torch.rand if self.uniform_base else torch.randn
            rest = draw(count, self.stiff_dimension, generator=generator, dtype=self.dtype)
            auxiliary = torch.randn(count, self.configuration.auxiliary, generator=generator, dtype=self.dtype)
            for block in self.blocks:
                turns, auxiliary = block(turns, auxiliary)
            stiff, _ = self.stiff(rest, self.features(turns))
        return Coordinates(turns, stiff), auxiliary


class FlowTeacher(nn.Module):
    """An augmented flow in Cartesian bead positions, with its joint forces.

    Args:
        beads: connected by bonds.
        temperature: K, that gives forces their unit.
        coordinates: fitted to frames.
        configuration: sizes.
    """

    def __init__(
        self,
        beads: Particles,
        temperature: float,
        coordinates: MoleculeCoordinates,
        configuration: TeacherConfiguration,
    ) -> None:
        super().__init__()
        self.beads, self.temperature = beads, temperature
        self.coordinates = coordinates
        self.flow = AugmentedFlow(coordinates, configuration)

    @classmethod
    def untrained(
        cls, beads: Particles, temperature: float, positions: NDArray[np.float64], configuration: TeacherConfiguration
    ) -> Self:
        """Return a teacher whose coordinates are fitted to frames ``(F, n, 3)`` nm; raises as :class:`MoleculeCoordinates`."""
        coordinates = MoleculeCoordinates.fit(beads, positions, configuration.flow())
        return cls(beads, temperature, coordinates, configuration)

    def log_prob(self, positions: Tensor, auxiliary: Tensor) -> Tensor:
        """Return log p(R, eta) ``(B,)``, float64, of positions ``(B, n, 3)`` nm and auxiliary variables ``(B, A)``."""
        coordinates, log_det = self.coordinates.inverse(positions)
        return self.flow.log_prob(coordinates, auxiliary).double() + log_det

    def log_ratio(self, positions: Tensor, auxiliary: Tensor) -> Tensor:
        """Return ``log p(R, eta) - log N(eta)`` ``(B,)``, float64: the flow's density relative to the data's normal eta."""
        noise = auxiliary.double()
        normal = -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2.0 * math.pi)
        return self.log_prob(positions, auxiliary) - normal

    def log_ratios(self, positions: Tensor, generator: torch.Generator) -> Tensor:
        """Return :meth:`log_ratio` of frames ``(F, n, 3)`` nm with a draw of the auxiliary variables for each."""
        count, dtype = self.flow.configuration.auxiliary, self.flow.dtype
        auxiliary = torch.randn(len(positions), count, generator=generator, dtype=dtype)
        parts = zip(positions.double().split(_CHUNK), auxiliary.split(_CHUNK), strict=True)
        with torch.no_grad():
            return torch.cat([self.log_ratio(*part) for part in parts])

    def evaluate(self, positions: Tensor, auxiliary: Tensor) -> TeacherSamples:
        """Return joint forces ``kT grad_R log p(R, eta)`` and log-ratios at ``(B, n, 3)`` nm and ``(B, A)``."""
        with torch.enable_grad():
            leaf = positions.detach().double().requires_grad_(True)
            log_ratio = self.log_ratio(leaf, auxiliary)
            (gradient,) = torch.autograd.grad(log_ratio.sum(), leaf)
        return TeacherSamples(leaf.detach(), thermal_energy(self.temperature) * gradient, log_ratio.detach())

    def sample(self, count: int, generator: torch.Generator) -> TeacherSamples:
        """Draw configurations with their joint forces."""
        parts = [self.evaluate(*drawn) for drawn in self._draws(count, generator)]
        return TeacherSamples(*(torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)))

    def propose(self, count: int, generator: torch.Generator) -> Proposals:
        """Draw configurations with what importance weights need; ``log_weight = -U/kT - log_ratio``."""
        with torch.no_grad():
            parts = [(drawn[0], self.log_ratio(*drawn)) for drawn in self._draws(count, generator)]
        return Proposals(*(torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)))

    def _draws(self, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions and auxiliary variables in chunks."""
        if count < 1:
            raise ConfigurationError(f"the number of samples must be positive, got {count}")
        for start in range(0, count, _CHUNK):
            coordinates, auxiliary = self.flow.sample(min(_CHUNK, count - start), generator)
            with torch.no_grad():
                positions, _ = self.coordinates(coordinates)
            yield positions, auxiliary
