"""Finished molecules in padded tensors, and the orders in which they can be built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .formulas import ATOMIC_NUMBERS, ELEMENTS, Formula
from .partial_molecules import PartialMolecules, Placements, bonded_pairs, frames_at

_INDEX = {ATOMIC_NUMBERS[symbol]: index for index, symbol in enumerate(ELEMENTS)}


class BuildOrders(NamedTuple):
    """Orders ``(B, N)`` of rows, rows of no atom last, and the logarithm of the probability ``(B,)`` to draw each."""

    rows: Tensor
    log_probs: Tensor


class MoleculeSet(NamedTuple):
    """B molecules.

    Attributes:
        positions: ``(B, N, 3)`` in nm, zero in rows of no atom.
        elements: ``(B, N)``, indices into ``ELEMENTS``.
        counts: ``(B,)``, atoms of each; these come first.
    """

    positions: Tensor
    elements: Tensor
    counts: Tensor

    @classmethod
    def of(cls, molecules: Iterable[tuple[Any, Any]]) -> MoleculeSet:
        """Return the set of pairs of atomic numbers ``(n,)`` and positions ``(n, 3)`` in nm.

        Raises:
            ConfigurationError: when there is none, an element cannot be built, or positions do not fit or are not finite.
        """
        pairs = [(np.asarray(z, dtype=int), np.asarray(x, dtype=float)) for z, x in molecules]
        if not pairs:
            raise ConfigurationError("there are no molecules: give at least one")
        most = max(len(z) for z, _ in pairs)
        positions = torch.zeros(len(pairs), most, 3, dtype=torch.float64)
        elements = torch.zeros(len(pairs), most, dtype=torch.long)
        for row, (numbers, places) in enumerate(pairs):
            Formula.of_atomic_numbers(numbers)  # refuses other elements
            if places.shape != (len(numbers), 3) or not len(numbers) or not np.isfinite(places).all():
                raise ConfigurationError(
                    f"molecule {row}: positions must be finite, ({len(numbers)}, 3) in nm for {len(numbers)} atoms, got "
                    f"{places.shape}"
                )
            positions[row, : len(numbers)] = torch.from_numpy(places)
            elements[row, : len(numbers)] = torch.tensor([_INDEX[int(number)] for number in numbers])
        return cls(positions, elements, torch.tensor([len(z) for z, _ in pairs]))

    def select(self, rows: Tensor) -> MoleculeSet:
        """Return the molecules with these indices, without rows that none of them needs."""
        counts = self.counts[rows]
        most = int(counts.max())
        return MoleculeSet(self.positions[rows, :most], self.elements[rows, :most], counts)

    def permuted(self, orders: Tensor) -> MoleculeSet:
        """Return the molecules with their rows in the orders ``(B, N)``."""
        positions = self.positions.gather(1, orders.unsqueeze(-1).expand(-1, -1, 3))
        return MoleculeSet(positions, self.elements.gather(1, orders), self.counts)

    @property
    def there(self) -> Tensor:
        """Mask of the rows that hold an atom, ``(B, N)``."""
        return torch.arange(self.elements.shape[1]) < self.counts.unsqueeze(1)

    @property
    def bonds(self) -> Tensor:
        """Mask of the pairs near enough for a bond, ``(B, N, N)``."""
        distances = torch.linalg.vector_norm(self.positions.unsqueeze(1) - self.positions.unsqueeze(2), dim=-1)
        there = self.there
        return bonded_pairs(distances, self.elements) & there.unsqueeze(1) & there.unsqueeze(2)

    def draw_orders(self, generator: torch.Generator, jumps: float = 0.0) -> BuildOrders:
        """Draw an order for each molecule: each next atom evenly among those bonded to what is there, hydrogens last.

        Args:
            generator: source of random numbers for the choices.
            jumps: probability at each step to choose evenly among all atoms whose turn it is, bonded or not; when it is
                positive every order that a builder can take has a chance. Where nothing bonded is left, it is always so.
        """
        bonds, waiting = self.bonds, self.there.clone()
        batch, most = self.elements.shape
        heavy = waiting & (self.elements != 0)
        reached = torch.zeros_like(waiting)
        rows = torch.zeros(batch, most, dtype=torch.long)
        log_probs = torch.zeros(batch, dtype=torch.float64)
        index = torch.arange(batch)
        for step in range(most):
            heavy_left = waiting & heavy
            turn = torch.where(heavy_left.any(1, keepdim=True), heavy_left, waiting)
            near = turn & reached
            any_near = near.any(1, keepdim=True)
            evenly = turn.double() / turn.sum(1, keepdim=True).clamp(min=1)
            nearby = near.double() / near.sum(1, keepdim=True).clamp(min=1)
            weights = torch.where(any_near, (1.0 - jumps) * nearby + jumps * evenly, evenly)
            over = step >= self.counts
            padding = torch.zeros_like(weights)
            padding[:, step] = 1.0  # rows of no atom stay where they are
            weights = torch.where(over.unsqueeze(1), padding, weights)
            chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
            rows[:, step] = chosen
            log_probs += torch.where(over, 0.0, weights[index, chosen].log())
            waiting[index, chosen] = False
            reached = reached | bonds[index, chosen]
        return BuildOrders(rows, log_probs)

    def states(self, steps: Tensor) -> PartialMolecules:
        """Return the partial molecules before the steps ``(B,)`` when the rows are placed in their order."""
        most = max(int(steps.max()), 1)
        rows = torch.arange(self.elements.shape[1])
        left = (rows >= steps.unsqueeze(1)) & self.there
        bag = torch.stack([(left & (self.elements == element)).sum(1) for element in range(len(ELEMENTS))], 1)
        placed = rows[:most] < steps.unsqueeze(1)
        return PartialMolecules(self.positions[:, :most], self.elements[:, :most], placed, bag)

    def placements(self, steps: Tensor, state: PartialMolecules, focus: Tensor) -> Placements:
        """Return the atoms ``(B,)`` of the steps as attached to the focus ``(B,)``; the first atom's has an element only."""
        index = torch.arange(len(steps))
        distance, cosine, torsion = frames_at(state, focus).coordinates(self.positions[index, steps])
        first = steps == 0
        return Placements(
            focus,
            self.elements[index, steps],
            torch.where(first, 0.1, distance),
            torch.where(first, 0.0, torch.nan_to_num(cosine)),
            torch.where(first, 0.0, torsion),
        )
