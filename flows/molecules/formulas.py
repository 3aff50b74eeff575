"""Chemical formulas of neutral closed-shell molecules of hydrogen, carbon, nitrogen, oxygen and fluorine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from ...core.errors import ConfigurationError

ELEMENTS = ("H", "C", "N", "O", "F")
"""Elements of builders; ``PartialMolecules`` and networks count elements in this order."""

ATOMIC_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
"""Bonds of each element in the molecules that are called valid: neutral atoms without formal charges."""

_SYMBOLS = {number: symbol for symbol, number in ATOMIC_NUMBERS.items()}
_PART = re.compile(r"([A-Z][a-z]?)(\d*)")


@dataclass(frozen=True)
class Formula:
    """Number of atoms of each element, in the order of ``ELEMENTS``."""

    counts: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a formula such as ``C3H5NO2``.

        Raises:
            ConfigurationError: when it cannot be read, is charged, has other elements, or is that of no connected
                closed-shell molecule with the usual valences.
        """
        if re.search(r"[+\-]", text):
            raise ConfigurationError(
                f"the formula {text!r} is charged: only neutral molecules are built. Give the formula without the charge"
            )
        parts = _PART.findall(text)
        if not parts or "".join(symbol + number for symbol, number in parts) != text:
            raise ConfigurationError(
                f"cannot read the formula {text!r}: write element symbols and numbers, as in C3H5NO2"
            )
        counts = dict.fromkeys(ELEMENTS, 0)
        for symbol, number in parts:
            if symbol not in counts:
                raise ConfigurationError(
                    f"the formula {text!r} has {symbol}: molecules are built of {', '.join(ELEMENTS)} only"
                )
            counts[symbol] += int(number) if number else 1
        formula = cls(tuple(counts.values()))
        formula.require_possible()
        return formula

    @classmethod
    def of_atomic_numbers(cls, numbers: Iterable[int]) -> Self:
        """Return the formula of atoms, possible or not; raises ConfigurationError for other elements."""
        counts = dict.fromkeys(ELEMENTS, 0)
        for number in numbers:
            if int(number) not in _SYMBOLS:
                raise ConfigurationError(
                    f"an atom has the atomic number {int(number)}: molecules are built of {', '.join(ELEMENTS)} only"
                )
            counts[_SYMBOLS[int(number)]] += 1
        return cls(tuple(counts.values()))

    def require_possible(self) -> None:
        """Raise ConfigurationError unless some connected closed-shell molecule has this formula."""
        atoms, bonds = sum(self.counts), sum(VALENCES[e] * n for e, n in zip(ELEMENTS, self.counts, strict=True))
        if atoms == 0:
            raise ConfigurationError("a formula needs at least one atom")
        if bonds % 2:
            raise ConfigurationError(
                f"{self} is a radical: its atoms have {bonds} valences, an odd number. Only closed-shell molecules are "
                "built; check the number of hydrogens"
            )
        largest = max(VALENCES[e] for e, n in zip(ELEMENTS, self.counts, strict=True) if n)
        # Without bonds from an atom to itself, nor beyond triple ones.
        if self.unsaturation < 0 or 2 * largest > bonds or (atoms == 2 and largest > 3):
            raise ConfigurationError(
                f"no connected molecule has the formula {self}: C, N, O, F and H make 4, 3, 2, 1 and "
                f"1 bonds, which hold these {atoms} atoms together in no way. Check the number of hydrogens"
            )

    @property
    def possible(self) -> bool:
        """Whether :meth:`require_possible` raises nothing."""
        try:
            self.require_possible()
        except ConfigurationError:
            return False
        return True

    @property
    def heavy_atoms(self) -> int:
        """Number of atoms other than hydrogen."""
        return sum(self.counts[1:])

    @property
    def unsaturation(self) -> int:
        """Rings plus double bonds (a triple bond counts twice) of every molecule with the formula."""
        bonds = sum(VALENCES[e] * n for e, n in zip(ELEMENTS, self.counts, strict=True))
        return bonds // 2 - (sum(self.counts) - 1)

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        """Atomic number of every atom, in the order of ``ELEMENTS``."""
        return tuple(ATOMIC_NUMBERS[e] for e, n in zip(ELEMENTS, self.counts, strict=True) for _ in range(n))

    def __str__(self) -> str:
        """Return the formula in Hill's order: carbon, hydrogen, then by the alphabet."""
        numbers = dict(zip(ELEMENTS, self.counts, strict=True))
        order = ("C", "H", "F", "N", "O") if numbers["C"] else ("F", "H", "N", "O")
        return "".join(f"{e}{numbers[e] if numbers[e] > 1 else ''}" for e in order if numbers[e])
