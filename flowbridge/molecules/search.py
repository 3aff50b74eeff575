"""Search among built molecules: every isomer is evaluated once, those first whose energies are expected to be low."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import CoordinateError
from ..flows.molecules.bonds import Bond, find_bonds
from ..flows.molecules.formulas import Formula
from ..flows.molecules.graph_features import graph_features
from ..flows.molecules.isomer_energies import IsomerEnergies
from ..flows.molecules.judgement import Geometry, Judge
from ..integrations.molecular_graphs import canonical_smiles, relax_mmff
from .harvests import Harvest, fault_kind

_OPTIMISM = 0.5  # standard deviations that an isomer's energy is taken to be below what is expected


class Start(NamedTuple):
    """Where a relaxation starts: numbers ``(N,)``, positions ``(N, 3)`` in nm, bonds with orders."""

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    bonds: tuple[Bond, ...]


@dataclass
class Candidates:
    """Isomers among molecules as they were built, found without any energy; and why the others are none.

    Attributes:
        starts: geometries that are kept of each isomer, the first that come.
        isomers: those geometries, by canonical SMILES, in the order in which the isomers came.
        times: how often each was built.
        faults: why the other molecules are no isomers.
        built: how many molecules there were.
    """

    starts: int = 1
    isomers: dict[str, list[Start]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    built: int = 0

    def add(self, molecules: Iterable[Geometry]) -> None:
        """Take in molecules as built."""
        for numbers, positions in molecules:
            self.built += 1
            numbers, positions = np.asarray(numbers, dtype=int), np.asarray(positions, dtype=float)
            found = find_bonds(numbers, positions)
            fault = found.fault
            if fault is None:
                try:
                    smiles = canonical_smiles(numbers, found.bonds)
                except CoordinateError as error:
                    fault = str(error)
            if fault is not None:
                self.faults[fault_kind(fault)] += 1
                continue
            self.times[smiles] += 1
            geometries = self.isomers.setdefault(smiles, [])
            if len(geometries) < self.starts:
                geometries.append(Start(numbers, positions, found.bonds))

    @property
    def valid(self) -> int:
        """How many molecules are isomers as built."""
        return sum(self.times.values())


class Search:
    """Relaxes candidates of one formula.

    Each isomer is relaxed once before any is relaxed from a second geometry; one that another candidate has relaxed to already
    counts as relaxed. A relaxation starts from the minimum of MMFF94 nearest to what was built, where MMFF94 keeps the bonds.

    Args:
        formula: of all.
        judge: that relaxes.
        found: takes in what comes out.
        energies: what orders the isomers; they are taken in the order in which they were built when None.
    """

    def __init__(self, formula: Formula, judge: Judge, found: Harvest, energies: IsomerEnergies | None = None) -> None:
        self.formula, self.judge, self.found, self.energies = formula, judge, found, energies
        self.spent = 0
        """Evaluations, those that were only looked up included."""
        self._features: dict[str, Counter[str]] = {}
        self._tried: Counter[str] = Counter()

    def run(self, candidates: Candidates, evaluations: int | None = None, portion: int = 1) -> Iterator[int]:
        """Relax until nothing is left or the evaluations are spent, yielding how many have been.

        Args:
            candidates: that there are.
            evaluations: at most so many, up to the end of the relaxation that passes them; no limit when None.
            portion: molecules that are judged together.
        """
        while self.spent < (math.inf if evaluations is None else evaluations) and self.step(candidates, portion):
            yield self.spent

    def step(self, candidates: Candidates, portion: int = 1) -> int:
        """Relax the next ``portion`` molecules and return how many there were: 0 when nothing is left."""
        chosen = self._next(candidates, portion)
        starts = [candidates.isomers[smiles][self._tried[smiles]] for smiles in chosen]
        judgements = self.judge([(start.numbers, relaxed_start(start)) for start in starts]) if starts else []
        for smiles, start, judgement in zip(chosen, starts, judgements, strict=True):
            self.spent += judgement.evaluations
            self._tried[smiles] += 1
            reached = self.found.add(start.numbers, judgement)
            if reached is not None:
                self._know(reached, Start(start.numbers, judgement.positions, self.found.isomers[reached].bonds))
                self._tried[reached] = max(self._tried[reached], 1)
        return len(chosen)

    def count_builds(self, candidates: Candidates) -> None:
        """Write into what was found how often each isomer was built."""
        for smiles, isomer in self.found.isomers.items():
            times = max(candidates.times[smiles], 1)
            self.found.isomers[smiles] = dataclasses.replace(isomer, times=times)

    def _know(self, smiles: str, start: Start) -> None:
        if smiles not in self._features:
            self._features[smiles] = graph_features(start.numbers, start.bonds)

    def _next(self, candidates: Candidates, portion: int) -> list[str]:
        left = [smiles for smiles, starts in candidates.isomers.items() if self._tried[smiles] < len(starts)]
        if not left:
            return []
        fewest = min(self._tried[smiles] for smiles in left)
        left = [smiles for smiles in left if self._tried[smiles] == fewest]
        if self.energies is None:
            return left[:portion]
        for smiles in left:
            self._know(smiles, candidates.isomers[smiles][0])
        both = [*left, *(smiles for smiles in self.found.isomers if smiles not in left)]
        energies = [self.found.isomers[smiles].energy if smiles in self.found.isomers else None for smiles in both]
        guess = self.energies.guess(self.formula, [self._features[smiles] for smiles in both], energies)
        score = guess.mean - _OPTIMISM * guess.covariance.diagonal().clamp(min=0.0).sqrt()
        return [left[int(index)] for index in score[: len(left)].argsort()[:portion]]


def relaxed_start(start: Start) -> NDArray[np.float64]:
    """Return the positions ``(N, 3)`` in nm that a relaxation starts from."""
    try:
        relaxed = relax_mmff(start.numbers, start.bonds, start.positions)
    except CoordinateError:
        return start.positions
    kept = find_bonds(start.numbers, relaxed)
    same = kept.fault is None and {bond[:2] for bond in kept.bonds} == {bond[:2] for bond in start.bonds}
    return relaxed if same else start.positions
