"""The contract that every learned energy keeps: positions in, energy (and forces) out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .errors import ConfigurationError
from .model import Model


class EnergyAndForces(NamedTuple):
    """Energies ``(B,)`` in kJ/mol and forces ``(B, N, 3)`` in kJ/mol/nm."""

    energy: Tensor
    forces: Tensor


@dataclass(frozen=True)
class Particles:
    """What a potential acts on: one entry a particle, in the order of its positions.

    Attributes:
        names: atom or bead names.
        atomic_numbers: atomic numbers; 0 for a bead that is no chemical element.
        masses: masses in amu.
        bonds: index pairs (i, j); may be empty where they are not known.
        residue_names: residue name of each particle, for writing topologies.
        residue_indices: residue number of each particle, counted from 0.
    """

    names: tuple[str, ...]
    atomic_numbers: tuple[int, ...]
    masses: tuple[float, ...]
    bonds: tuple[tuple[int, int], ...] = ()
    residue_names: tuple[str, ...] = ()
    residue_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.names)
        if not self.residue_names:
            object.__setattr__(self, "residue_names", ("MOL",) * n)
        if not self.residue_indices:
            object.__setattr__(self, "residue_indices", (0,) * n)
        for label in ("atomic_numbers", "masses", "residue_names", "residue_indices"):
            if len(getattr(self, label)) != n:
                raise ConfigurationError(f"{label} has {len(getattr(self, label))} entries for {n} names")
        for i, j in self.bonds:
            if not (0 <= i < n and 0 <= j < n and i != j):
                raise ConfigurationError(f"bond ({i}, {j}) is outside the {n} particles or joins one to itself")

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """Return a readable name such as ``'CA (atom 8 of ALA 2)'`` for messages."""
        residue = f"{self.residue_names[index]} {self.residue_indices[index] + 1}"
        return f"{self.names[index]} (atom {index} of {residue})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, ready for JSON."""
        return {
            **{name: list(values) for name, values in vars(self).items()},
            "bonds": [list(bond) for bond in self.bonds],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`."""
        return cls(
            names=tuple(data["names"]),
            atomic_numbers=tuple(int(z) for z in data["atomic_numbers"]),
            masses=tuple(float(m) for m in data["masses"]),
            bonds=tuple((int(i), int(j)) for i, j in data["bonds"]),
            residue_names=tuple(data["residue_names"]),
            residue_indices=tuple(int(r) for r in data["residue_indices"]),
        )


@dataclass(frozen=True)
class PotentialMetadata:
    """What an engine must know about a potential before it can use it.

    Attributes:
        particles: the particles it was made for.
        periodic: whether ``forward`` needs a cell.
        temperature: K at which it was trained, None if it has none. A potential of mean force or a flow energy
            means something at this temperature only.
        global_parameters: name to default value of keyword arguments that ``forward`` takes.
        rigid: whether the particles are sites of rigid bodies: an engine has to hold them by constraints or as virtual sites,
            which a potential that samples every bond does not allow.
    """

    particles: Particles
    periodic: bool = False
    temperature: float | None = None
    global_parameters: dict[str, float] = field(default_factory=dict)
    rigid: bool = False


class Potential(Model):
    """An energy function of positions that can be trained, saved, and handed to any simulation engine.

    A subclass sets ``metadata`` and writes :meth:`forward`; to be stored in a model file it also does what
    :class:`~flowbridge.core.model.Model` asks for.
    """

    description: ClassVar[str] = "a potential, which has an energy of positions"

    metadata: PotentialMetadata

    one_program: ClassVar[bool] = True
    """Whether adapters compile energy and forces as one program unless told otherwise. False where that takes many minutes,
    as for an integral over many steps; ``compilation="always"`` still does it."""

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol, float64.

        Args:
            positions: ``(B, N, 3)`` in nm, any floating dtype, on the device of the potential.
            cell: ``(B, 3, 3)``, row vectors in nm, or None for an open system.
            **global_parameters: values for names of ``metadata.global_parameters``.
        """
        raise TypeError(f"{type(self).__name__} defines no energy: write its forward(positions, cell=None)")

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """Return energies ``(B,)`` in kJ/mol and forces ``(B, N, 3)`` in kJ/mol/nm, both detached.

        The default differentiates :meth:`forward`; a subclass with forces in closed form overrides this.
        Arguments as for :meth:`forward`.
        """
        with torch.enable_grad():
            leaf = positions.detach().requires_grad_(True)
            energy = self(leaf, cell, **global_parameters)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return EnergyAndForces(energy.detach(), -gradient)

    def check_arguments(self, cell: Tensor | None, global_parameters: dict[str, float]) -> None:
        """Refuse a cell and global parameters, for the :meth:`forward` of what has none: an isolated molecule, for instance."""
        if cell is not None or global_parameters:
            raise ConfigurationError(
                f"{self.description} takes neither a cell nor global parameters: make the molecule whole and pass positions "
                "only"
            )

    def energies(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol without forces, detached; arguments as for :meth:`forward`.

        The default is :meth:`forward` without recording gradients; a subclass that has something faster overrides this.
        """
        with torch.no_grad():
            energy: Tensor = self(positions.detach(), cell, **global_parameters)
        return energy

    def example_positions(self, count: int, generator: torch.Generator) -> Tensor:
        """Return configurations ``(count, N, 3)`` in nm to compile, check and time the potential with.

        The default is a cloud of points at the density of a liquid; a subclass that can draw plausible configurations of
        its system overrides this.
        """
        particles = len(self.metadata.particles)
        return 0.1 * particles ** (1 / 3) * torch.randn(count, particles, 3, generator=generator, dtype=torch.float64)

    def describe_strain(self, positions: Tensor) -> str:
        """Return a sentence on what is worst about a configuration ``(N, 3)`` in nm, for the message of a stopped run.

        The default names the particle with the largest force; a subclass that knows its terms may name them.
        """
        _, forces = self.energy_and_forces(positions.detach().double()[None])
        sizes = torch.nan_to_num(forces[0], nan=float("inf")).norm(dim=-1)
        worst = int(sizes.argmax())
        return f"the largest force, {float(sizes[worst]):.3g} kJ/mol/nm, is on {self.metadata.particles.label(worst)}"

    def header_metadata(self) -> dict[str, Any]:
        """See :meth:`Model.header_metadata`."""
        return {
            "particles": self.metadata.particles.to_dict(),
            "temperature": self.metadata.temperature,
            "periodic": self.metadata.periodic,
            "global_parameters": dict(self.metadata.global_parameters),
        }
