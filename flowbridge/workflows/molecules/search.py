"""Search among built molecules: every isomer is evaluated once, those first whose energies are expected to be low."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import CoordinateError
from ...flows.molecules.bonds import Bond, find_bonds
from ...flows.molecules.formulas import Formula
from ...flows.molecules.graph_features import graph_features
from ...flows.molecules.training.evaluation import Evaluation, Geometry, GeometryEvaluator
from ...flows.molecules.training.isomer_energies import IsomerEnergies
from ...integrations.rdkit.molecular_graphs import RelaxedByMMFF, canonical_smiles, relax_mmff
from .results import IsomerResults, fault_kind

_OPTIMISM = 0.5  # standard deviations that an isomer's energy is taken to be below what is expected
_CLOSE = 0.1  # eV above the lowest isomer, what another geometry may gain
_SAME = 0.05  # kJ/mol between minima of MMFF94 that are taken for one


class Start(NamedTuple):
    """Where a relaxation starts: numbers ``(N,)``, positions ``(N, 3)`` in nm, bonds with orders."""

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    bonds: tuple[Bond, ...]


@dataclass
class Candidates:
    """Isomers among molecules as they were built, found without any energy; and why the others are none.

    Attributes:
        kept: geometries that are kept of each isomer, the first that come.
        isomers: those geometries, by canonical SMILES, in the order in which the isomers came.
        times: how often each was built.
        faults: why the other molecules are no isomers.
        built: how many molecules there were.
    """

    kept: int = 8
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
            if len(geometries) < self.kept:
                geometries.append(Start(numbers, positions, found.bonds))

    @property
    def valid(self) -> int:
        """How many molecules are isomers as built."""
        return sum(self.times.values())


class Search:
    """Relaxes candidates of one formula.

    A relaxation starts from the minimum of MMFF94 nearest to what was built, where MMFF94 keeps the bonds; of several
    geometries of an isomer that with the lowest one comes first. Each isomer is relaxed once before any is relaxed from a
    second geometry, except those within 0.1 eV of the lowest when none that is left is expected below it. An isomer that
    another candidate has relaxed to already counts as relaxed.

    Args:
        formula: of all.
        evaluator: that relaxes.
        found: takes in what comes out.
        energies: what orders the isomers; they are taken in the order in which they were built when None.
        starts: geometries that each isomer is relaxed from at most.
    """

    def __init__(
        self,
        formula: Formula,
        evaluator: GeometryEvaluator,
        found: IsomerResults,
        energies: IsomerEnergies | None = None,
        starts: int = 1,
    ) -> None:
        self.formula, self.evaluator, self.found, self.energies, self.starts = (
            formula,
            evaluator,
            found,
            energies,
            starts,
        )
        self.spent = 0
        """Evaluations, those that were only looked up included."""
        self._features: dict[str, Counter[str]] = {}
        self._tried: Counter[str] = Counter()
        self._minima: dict[str, list[Geometry]] = {}

    def run(self, candidates: Candidates, evaluations: int | None = None, portion: int = 1) -> Iterator[int]:
        """Relax until nothing is left or the evaluations are spent, yielding how many have been.

        Args:
            candidates: that there are.
            evaluations: at most so many, up to the end of the relaxation that passes them; no limit when None.
            portion: molecules that are evaluated together.
        """
        while self.spent < (math.inf if evaluations is None else evaluations) and self.step(candidates, portion):
            yield self.spent

    def step(self, candidates: Candidates, portion: int = 1) -> int:
        """Relax the next ``portion`` molecules and return how many there were: 0 when nothing is left."""
        chosen = self._next(candidates, portion)
        geometries = [self._minima_of(smiles, candidates)[self._tried[smiles]] for smiles in chosen]
        for smiles, (numbers, _), evaluation in zip(chosen, geometries, self._evaluated(geometries), strict=True):
            self.spent += evaluation.evaluations
            self._tried[smiles] += 1
            reached = self.found.add(numbers, evaluation)
            if reached is not None:
                self._know(reached, Start(numbers, evaluation.positions, self.found.isomers[reached].bonds))
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

    def _evaluated(self, geometries: list[Geometry]) -> Sequence[Evaluation]:
        return self.evaluator(geometries) if geometries else ()

    def _next(self, candidates: Candidates, portion: int) -> list[str]:
        left = [smiles for smiles in candidates.isomers if self._tried[smiles] < self._limit(smiles, candidates)]
        if self.energies is None:
            fewest = min((self._tried[smiles] for smiles in left), default=0)
            return [smiles for smiles in left if self._tried[smiles] == fewest][:portion]
        new = [smiles for smiles in left if not self._tried[smiles]]
        again = sorted((smiles for smiles in left if self._tried[smiles]), key=self._worth_again)
        scores = self._scores(new, candidates, self.energies)
        order = scores.argsort().tolist()
        ranked = [new[index] for index in order]
        lowest = min((isomer.energy for isomer in self.found.isomers.values()), default=math.inf)
        if ranked and float(scores[order[0]]) < lowest:
            close = []
        else:
            close = [smiles for smiles in again if self._energy(smiles) < lowest + _CLOSE]
        return [*close, *ranked, *(smiles for smiles in again if smiles not in close)][:portion]

    def _limit(self, smiles: str, candidates: Candidates) -> int:
        """Return how many relaxations of an isomer there can be; minima are looked for from the second one on."""
        if self.starts == 1 or not self._tried[smiles]:
            return 1
        return min(self.starts, len(self._minima_of(smiles, candidates)))

    def _minima_of(self, smiles: str, candidates: Candidates) -> list[Geometry]:
        if smiles not in self._minima:
            self._minima[smiles] = minima(candidates.isomers[smiles])
        return self._minima[smiles]

    def _energy(self, smiles: str) -> float:
        return self.found.isomers[smiles].energy if smiles in self.found.isomers else math.inf

    def _worth_again(self, smiles: str) -> tuple[int, float]:
        return self._tried[smiles], self._energy(smiles)

    def _scores(self, new: list[str], candidates: Candidates, energies: IsomerEnergies) -> Tensor:
        """Return below what an energy (eV) is hoped to be, of each isomer that has not been relaxed."""
        for smiles in new:
            self._know(smiles, candidates.isomers[smiles][0])
        both = [*new, *(smiles for smiles in self.found.isomers if smiles not in new)]
        known = [self.found.isomers[smiles].energy if smiles in self.found.isomers else None for smiles in both]
        guess = energies.guess(self.formula, [self._features[smiles] for smiles in both], known)
        hoped = guess.mean - _OPTIMISM * guess.covariance.diagonal().clamp(min=0.0).sqrt()
        return hoped[: len(new)]


def minima(starts: Sequence[Start]) -> list[Geometry]:
    """Return what one isomer may be relaxed from: different minima of MMFF94, the lowest first.

    Args:
        starts: geometries of the isomer, each with its own order of the atoms.
    """
    relaxed = [(start.numbers, relaxed_start(start)) for start in starts]
    relaxed.sort(key=lambda one: math.inf if one[1].energy is None else one[1].energy)
    different: list[Geometry] = []
    last: float | None = None
    for numbers, (positions, energy) in relaxed:
        if energy is None or last is None or energy > last + _SAME:
            different.append((numbers, positions))
            last = energy
    return different


def relaxed_start(start: Start) -> RelaxedByMMFF:
    """Return MMFF94's minimum where it keeps the bonds, and else what was built, without an energy."""
    try:
        relaxed = relax_mmff(start.numbers, start.bonds, start.positions)
    except CoordinateError:
        return RelaxedByMMFF(start.positions, None)
    kept = find_bonds(start.numbers, relaxed.positions)
    same = kept.fault is None and {bond[:2] for bond in kept.bonds} == {bond[:2] for bond in start.bonds}
    return relaxed if same else RelaxedByMMFF(start.positions, None)
