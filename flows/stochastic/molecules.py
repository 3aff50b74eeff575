"""Stochastic flows of molecules: energies over internal coordinates, and paths as weighted samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.energy import EnergiesWithForces, as_batched_energy, differentiable_energies
from ...core.errors import ConfigurationError, MoleculeMismatchError
from ...core.potential import Particles
from ...core.reweighting import Draws, reweight
from ...core.samples import WeightedSamples
from ...core.units import thermal_energy
from ..boltzmann.generator import BoltzmannGenerator
from ..boltzmann.molecule_coordinates import Coordinates, MoleculeCoordinates
from .resampling import Resampling
from .stochastic_flow import Paths, StochasticFlow

_TURN = math.sqrt(12.0)  # what a turn is stretched to: uniform angles have unit variance then


class FlatCoordinates(nn.Module):
    """Positions ``(B, N, 3)`` nm <-> ``(B, D)``, real numbers of order one: circular torsions first, stiff coordinates after.

    A torsion is cut open where data have it least, and becomes a number between ``-sqrt(3)`` and ``sqrt(3)``; numbers outside
    are the same torsion again, and no distribution should be there.

    Args:
        coordinates: of the molecule.
        cuts: ``(C,)`` turns in [0, 1), where each circular torsion is cut.
    """

    cuts: Tensor

    def __init__(self, coordinates: MoleculeCoordinates, cuts: Tensor) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.circular = len(coordinates.layout.circular)
        self.dimension = self.circular + coordinates.stiff_dimension
        if cuts.shape != (self.circular,):
            raise ConfigurationError(f"{self.circular} circular torsions need as many cuts, got {tuple(cuts.shape)}")
        self.register_buffer("cuts", cuts.double())

    @classmethod
    def fit(cls, coordinates: MoleculeCoordinates, positions: Tensor) -> FlatCoordinates:
        """Return coordinates with the cuts where frames ``(F, N, 3)`` nm are least frequent (within 10 degrees)."""
        turns = coordinates.inverse(positions)[0].circular
        grid = torch.arange(72, dtype=torch.float64) / 72.0
        distance = (turns.unsqueeze(2) - grid + 0.5) % 1.0 - 0.5
        density = torch.exp(-0.5 * (distance / (10.0 / 360.0)).square()).sum(0)
        return cls(coordinates, grid[density.argmin(1)])

    def inverse(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return flat coordinates ``(B, D)``, float64, and ``log |d coordinates / d positions|`` ``(B,)``."""
        (circular, stiff), log_det = self.coordinates.inverse(positions)
        opened = circular - self.cuts
        opened = opened - opened.detach().floor()
        return torch.cat([_TURN * (opened - 0.5), stiff], 1), log_det + self.circular * math.log(_TURN)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions ``(B, N, 3)`` nm and ``log |d positions / d coordinates|`` ``(B,)``; float64."""
        turns = value[:, : self.circular].double() / _TURN + 0.5 + self.cuts
        turns = turns - turns.detach().floor()
        positions, log_det = self.coordinates(Coordinates(turns, value[:, self.circular :].double()))
        return positions, log_det - self.circular * math.log(_TURN)

    def overhang(self, value: Tensor) -> Tensor:
        """Return ``(B, C)`` by how many turns each torsion is outside of its interval."""
        return torch.relu((value[:, : self.circular].double() / _TURN).abs() - 0.5)


class MoleculeEnergy(nn.Module):
    """``U/kT - log |d positions / d coordinates|`` over flat coordinates, tamed so that it is finite everywhere.

    Above ``soft_limit`` the energy grows like its logarithm, a configuration that has none counts as one at ``hard_limit``,
    and torsions outside of their interval are pulled back by a spring. Kernels and losses can live with this energy; the
    weights of :func:`sample_molecules` are those of the energy itself.

    Args:
        flat: the coordinates.
        energy: batched energies and forces.
        temperature: K.
        reference: kJ/mol, the energy from which the limits count; about the lowest one of frames.
        soft_limit: kT.
        hard_limit: kT; from here on the energy is constant.
        spring: kT a square turn.
    """

    def __init__(
        self,
        flat: FlatCoordinates,
        energy: EnergiesWithForces,
        temperature: float,
        reference: float,
        *,
        soft_limit: float = 500.0,
        hard_limit: float = 1e4,
        spring: float = 4000.0,
    ) -> None:
        super().__init__()
        if not 0.0 < soft_limit < hard_limit:
            raise ConfigurationError(f"limits must be 0 < soft < hard, got {soft_limit} and {hard_limit} kT")
        self.flat = flat
        self.energy = as_batched_energy(energy)
        self.temperature = temperature
        self.reference = reference
        self.limits = (soft_limit, hard_limit)
        self.spring = spring

    def forward(self, value: Tensor) -> Tensor:
        """Return tamed reduced energies ``(B,)``, float64; differentiable once."""
        positions, log_volume = self.flat(value)
        soft, hard = self.limits
        height = (differentiable_energies(self.energy, positions) - self.reference) / thermal_energy(self.temperature)
        height = torch.where(torch.isfinite(height), height, torch.full_like(height, hard)).clamp(max=hard)
        tamed = torch.where(height > soft, soft + torch.log1p((height - soft).clamp_min(0.0)), height)
        wall = 0.5 * self.spring * self.flat.overhang(value).square().sum(-1)
        # The volume of bonds and angles that are no bonds and angles (a negative length) has no logarithm.
        usable = torch.isfinite(log_volume)
        volume = torch.where(usable, log_volume, torch.zeros_like(log_volume))
        return tamed + wall - volume


class GeneratorPrior(nn.Module):
    """A Boltzmann generator as the beginning of paths over Cartesian positions ``(B, 3 N)`` in nm.

    Its density leaves rigid motion out, which no energy of an isolated molecule sees: weights need none of it.
    """

    def __init__(self, model: BoltzmannGenerator) -> None:
        super().__init__()
        self.model = model

    def log_prob(self, value: Tensor) -> Tensor:
        """See :meth:`Distribution.log_prob`."""
        return self.model.log_prob(value.unflatten(1, (-1, 3)))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Distribution.sample`."""
        return self.model.sample_positions(count, generator).positions.flatten(1)


class PositionEnergy(nn.Module):
    """``U/kT`` over Cartesian positions ``(B, 3 N)`` in nm; ``+inf`` where there is no energy.

    Args:
        energy: batched energies and forces.
        temperature: K.
    """

    def __init__(self, energy: EnergiesWithForces, temperature: float) -> None:
        super().__init__()
        self.energy = as_batched_energy(energy)
        self.beta = 1.0 / thermal_energy(temperature)

    def forward(self, value: Tensor) -> Tensor:
        """Return reduced energies ``(B,)``, float64; differentiable once."""
        reduced = self.beta * differentiable_energies(self.energy, value.unflatten(1, (-1, 3)))
        return torch.where(torch.isfinite(reduced), reduced, torch.full_like(reduced, torch.inf))


def sample_molecules(
    flow: StochasticFlow,
    particles: Particles,
    count: int,
    target: Any,
    seed: int = 0,
    resampling: Resampling | None = None,
) -> WeightedSamples:
    """Draw paths of a flow whose target is a :class:`MoleculeEnergy`, as samples weighted to the Boltzmann distribution.

    Args:
        flow: the flow.
        particles: of the molecule.
        count: number of paths.
        target: an ``openmm.System``, a Potential, the path of a model file or a BatchedEnergy, of the same particles. It need
            not be the energy that the flow was trained with: paths are weighted to this one.
        seed: of all random numbers.
        resampling: see :meth:`StochasticFlow.sample`.

    Returns:
        Samples with path weights towards the energy as it is, nothing tamed; those whose energy is not finite, or with a
        torsion outside of its interval, get weight 0 and stay in the set. There is no reduced potential of the generator: paths
        have weights, their ends have no known density.

    Raises:
        ConfigurationError: when the flow's target is no MoleculeEnergy.
        NonFiniteEnergyError: when no path has a weight.
    """
    tamed = flow.target
    if not isinstance(tamed, MoleculeEnergy):
        raise ConfigurationError(f"the target of the flow is a {type(tamed).__name__}, expected a MoleculeEnergy")
    if len(particles) != tamed.flat.coordinates.internal.zmatrix.atom_count:
        raise MoleculeMismatchError(
            f"{len(particles)} particles were given for coordinates of "
            f"{tamed.flat.coordinates.internal.zmatrix.atom_count} atoms"
        )
    paths = flow.sample(count, torch.Generator().manual_seed(seed), resampling)
    with torch.no_grad():
        positions, log_volume = tamed.flat(paths.value)
        tamed_energy = tamed(paths.value)
        outside = (tamed.flat.overhang(paths.value) > 0.0).any(1)
    # Weights come with the tamed energy of coordinates, which the energy of positions replaces.
    work = paths.log_weights.double() + tamed_energy + log_volume
    work = torch.where(outside, torch.full_like(work, -torch.inf), work)
    return samples_of_paths(paths, positions, work, target, particles, tamed.temperature, {"seed": seed})


def samples_of_paths(
    paths: Paths,
    positions: Tensor,
    work: Tensor,
    target: Any,
    particles: Particles,
    temperature: float,
    provenance: Mapping[str, Any],
) -> WeightedSamples:
    """Return the ends of paths as samples with the log-weights ``work - U/kT``.

    Args:
        paths: what became of them.
        positions: ``(B, N, 3)`` nm of their ends.
        work: log-weights of the paths ``(B,)`` without the target's energy; not finite for those that have no weight.
        target: what U is of; see :func:`~flowbridge.core.reweighting.reweight`.
        particles: of the molecule.
        temperature: K.
        provenance: what made them; acceptance and number of resamplings are added.

    Raises:
        NonFiniteEnergyError: when no path has a weight.
    """
    acceptance = [None if math.isnan(value) else value for value in paths.acceptance]
    return reweight(
        Draws(positions.double(), -work.double()),
        target,
        particles,
        temperature,
        paths=True,
        provenance={**provenance, "acceptance": acceptance, "resampled": paths.resampled},
    )
