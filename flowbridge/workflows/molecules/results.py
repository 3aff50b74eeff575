"""What came of evaluated molecules: isomers in their best geometries, and reasons why the others are none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...core.errors import CoordinateError
from ...flows.molecules.bonds import Bond, find_bonds
from ...flows.molecules.training.evaluation import Evaluation
from ...integrations.rdkit.molecular_graphs import canonical_smiles
from .novelty import Taught


@dataclass(frozen=True)
class FoundIsomer:
    """One isomer, in the best geometry that was found.

    Attributes:
        smiles: canonical, without stereochemistry.
        numbers: ``(N,)`` atomic numbers.
        positions: ``(N, 3)`` in nm, relaxed.
        bonds: with orders.
        energy: in eV.
        times: how often it was found.
        novel: whether the builder was not taught with it, by SMILES.
        novel_geometry: whether it was not taught with this geometry; another conformer of an isomer is another geometry.
    """

    smiles: str
    numbers: np.ndarray
    positions: np.ndarray
    bonds: tuple[Bond, ...]
    energy: float
    times: int
    novel: bool
    novel_geometry: bool


@dataclass
class IsomerResults:
    """Isomers among evaluated molecules, best geometry of each; and why the others are none."""

    taught: Taught = field(default_factory=Taught)
    isomers: dict[str, FoundIsomer] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    evaluated: int = 0
    evaluations: int = 0

    def add(self, numbers: Any, evaluation: Evaluation) -> str | None:
        """Take in one molecule and return its SMILES, or None where it is no valid one."""
        self.evaluated += 1
        self.evaluations += 0 if evaluation.known else evaluation.evaluations
        found = find_bonds(numbers, evaluation.positions) if evaluation.energy is not None else None
        fault = evaluation.fault if found is None else found.fault
        smiles = None
        if found is not None and fault is None:
            try:
                smiles = canonical_smiles(numbers, found.bonds)
            except CoordinateError as error:
                fault = str(error)
        if smiles is None or found is None or evaluation.energy is None:
            self.faults[fault_kind(fault or "no energy")] += 1
            return None
        before = self.isomers.get(smiles)
        times = 1 if before is None else before.times + 1
        if before is None or evaluation.energy < before.energy:
            best = (np.asarray(numbers), evaluation.positions, found.bonds, evaluation.energy)
        else:
            best = (before.numbers, before.positions, before.bonds, before.energy)
        novel = smiles not in self.taught.smiles
        self.isomers[smiles] = FoundIsomer(smiles, *best, times, novel, not self.taught.has_geometry(*best[:2]))
        return smiles

    def copy(self) -> IsomerResults:
        """Return what there is now; what is added later does not change it."""
        return IsomerResults(self.taught, dict(self.isomers), Counter(self.faults), self.evaluated, self.evaluations)

    @property
    def valid(self) -> int:
        """How many of the evaluated molecules are valid."""
        return self.evaluated - sum(self.faults.values())

    @property
    def ranked(self) -> list[FoundIsomer]:
        """From the lowest energy to the highest."""
        return sorted(self.isomers.values(), key=lambda isomer: isomer.energy)


def fault_kind(fault: str) -> str:
    """Return a reason without the numbers of its atoms, so that equal reasons count together."""
    if fault.startswith("atom "):
        return "an atom has too many neighbours"
    if fault.startswith("atoms "):
        return "atoms are on top of each other"
    return fault.partition("\n")[0]
