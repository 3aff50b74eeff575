"""The molecule of a quantum Monte Carlo calculation: nuclei in bohr, electrons by spin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ...core.errors import ConfigurationError

TESTED_NUMBERS = frozenset(range(1, 11))
"""Elements for which orbitals, Jastrow factor and sampler were tested: hydrogen to neon."""

_CLOSEST = 0.3  # bohr; nuclei nearer than that are a mistake, not a molecule


@dataclass(frozen=True)
class Molecule:
    """Nuclei and electrons, in atomic units.

    Attributes:
        numbers: atomic numbers.
        positions: positions of the nuclei, bohr, one triple each.
        charge: total charge in e.
        spin: number of spin-up minus number of spin-down electrons (multiplicity - 1).

    Raises:
        ConfigurationError: for untested elements, overlapping atoms, and numbers of electrons that charge and spin make
            impossible.
    """

    numbers: tuple[int, ...]
    positions: tuple[tuple[float, float, float], ...]
    charge: int = 0
    spin: int = 0

    def __post_init__(self) -> None:
        if not self.numbers or len(self.numbers) != len(self.positions):
            raise ConfigurationError(
                f"a molecule needs as many positions as atomic numbers, at least one: got {len(self.numbers)} numbers "
                f"and {len(self.positions)} positions"
            )
        unknown = sorted(set(self.numbers) - TESTED_NUMBERS)
        if unknown:
            raise ConfigurationError(
                f"atomic numbers {unknown} are beyond what was tested: hydrogen (1) to neon (10). All electrons are "
                "treated, and the cost grows steeply with the charge of the nucleus"
            )
        places = np.array(self.positions, dtype=np.float64)
        if places.shape != (len(self.numbers), 3) or not np.isfinite(places).all():
            raise ConfigurationError(f"positions must be finite triples in bohr, got {self.positions}")
        for i in range(len(places)):
            for j in range(i):
                distance = float(np.linalg.norm(places[i] - places[j]))
                if distance < _CLOSEST:
                    raise ConfigurationError(
                        f"atoms {j} and {i} are {distance:.3g} bohr apart: they lie on top of each other. Expected at "
                        f"least {_CLOSEST} bohr; check the positions and their units"
                    )
        electrons = sum(self.numbers) - self.charge
        if electrons < 1:
            raise ConfigurationError(f"charge {self.charge} leaves {electrons} electrons of {sum(self.numbers)}")
        if abs(self.spin) > electrons or (electrons - self.spin) % 2:
            raise ConfigurationError(
                f"{electrons} electrons (charge {self.charge}) cannot have {self.spin} more with spin up than with spin "
                f"down: give {'an even' if electrons % 2 == 0 else 'an odd'} number of at most {electrons}"
            )
        if self.spin < 0:
            raise ConfigurationError(f"spin is the surplus of spin-up electrons and not negative, got {self.spin}")

    @property
    def electrons(self) -> int:
        """Number of electrons."""
        return sum(self.numbers) - self.charge

    @property
    def spin_up(self) -> int:
        """Number of electrons with spin up; they come first wherever electrons are listed."""
        return (self.electrons + self.spin) // 2

    @property
    def spin_down(self) -> int:
        """Number of electrons with spin down."""
        return (self.electrons - self.spin) // 2

    @property
    def charges(self) -> Tensor:
        """Nuclear charges ``(A,)``, float64."""
        return torch.tensor(self.numbers, dtype=torch.float64)

    @property
    def centers(self) -> Tensor:
        """Nuclear positions ``(A, 3)`` in bohr, float64."""
        return torch.tensor(self.positions, dtype=torch.float64)

    @property
    def nuclear_repulsion(self) -> float:
        """Energy of the nuclei among themselves, Hartree."""
        distances = torch.pdist(self.centers)
        i, j = torch.triu_indices(len(self.numbers), len(self.numbers), 1)
        return float((self.charges[i] * self.charges[j] / distances).sum())

    def labels(self) -> list[str]:
        """Return names such as ``O0``, ``H1`` of the atoms."""
        return [f"{chemical_symbols[number]}{index}" for index, number in enumerate(self.numbers)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "numbers": list(self.numbers),
            "positions": [list(place) for place in self.positions],
            "charge": self.charge,
            "spin": self.spin,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`."""
        return cls.build(data["numbers"], data["positions"], data["charge"], data["spin"])

    @classmethod
    def build(cls, numbers: Sequence[int], positions: Any, charge: int = 0, spin: int | None = None) -> Self:
        """Return the molecule of sequences or arrays; the lowest possible spin where ``spin`` is None."""
        places = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
        counts = tuple(int(number) for number in numbers)
        if charge != int(charge) or (spin is not None and spin != int(spin)):
            raise ConfigurationError(f"charge and spin must be whole numbers, got {charge!r} and {spin!r}")
        lowest = (sum(counts) - int(charge)) % 2
        triples = tuple((float(x), float(y), float(z)) for x, y, z in places)
        return cls(counts, triples, int(charge), lowest if spin is None else int(spin))

    def same_as(self, other: Molecule, tolerance: float = 1e-6) -> bool:
        """Return whether both are the same nuclei at the same places (bohr) with the same electrons."""
        return (self.numbers, self.charge, self.spin) == (other.numbers, other.charge, other.spin) and float(
            (self.centers - other.centers).abs().max()
        ) <= tolerance
