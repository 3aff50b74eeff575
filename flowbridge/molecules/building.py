"""What ``flowbridge build`` does: build molecules of a formula, relax them, and keep one of each isomer, ranked by energy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import nm
from rich.console import Console
from rich.table import Table

from ..calculators.molecule_judge import JudgeSettings, MoleculeJudge
from ..core.errors import ConfigurationError, CoordinateError
from ..core.model_files import load, read_header
from ..core.spreading import Spread
from ..flows.molecules.bonds import Bond, find_bonds
from ..flows.molecules.builder import MoleculeBuilder
from ..flows.molecules.formulas import Formula
from ..flows.molecules.judgement import Geometry, Judge, Judgement
from ..integrations.molecular_graphs import canonical_smiles, molecule_of, write_sdf
from ..workflows.progress import track

_PORTION = 8  # molecules that are judged before the bar moves
KNOWN = "trained_on"
"""Where the provenance of a builder keeps the SMILES of the molecules that it was taught with."""


@dataclass(frozen=True)
class BuildRequest:
    """What is built.

    Attributes:
        formula: such as ``C3H5NO2``.
        output: folder for results.
        count: molecules to build.
        model: file of a builder; the one that comes with flowbridge when None.
        calculator: see :data:`~flowbridge.calculators.molecule_judge.CalculatorSource`; a string.
        seed: of everything random.
    """

    formula: str
    output: Path
    count: int = 200
    model: Path | None = None
    calculator: str = "gfn2"
    seed: int = 1


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
        novel: whether the builder was not taught with it.
    """

    smiles: str
    numbers: np.ndarray
    positions: np.ndarray
    bonds: tuple[Bond, ...]
    energy: float
    times: int
    novel: bool


@dataclass
class Harvest:
    """Isomers among judged molecules, best geometry of each; and why the others are none."""

    known: frozenset[str] = frozenset()
    isomers: dict[str, FoundIsomer] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    evaluations: int = 0

    def add(self, numbers: Any, judgement: Judgement) -> str | None:
        """Take in one molecule and return its SMILES, or None where it is no valid one."""
        self.judged += 1
        self.evaluations += 0 if judgement.known else judgement.evaluations
        found = find_bonds(numbers, judgement.positions) if judgement.energy is not None else None
        fault = judgement.fault if found is None else found.fault
        smiles = None
        if found is not None and fault is None:
            try:
                smiles = canonical_smiles(numbers, found.bonds)
            except CoordinateError as error:
                fault = str(error)
        if smiles is None or found is None or judgement.energy is None:
            self.faults[_kind(fault or "no energy")] += 1
            return None
        before = self.isomers.get(smiles)
        times = 1 if before is None else before.times + 1
        if before is None or judgement.energy < before.energy:
            best = (np.asarray(numbers), judgement.positions, found.bonds, judgement.energy)
        else:
            best = (before.numbers, before.positions, before.bonds, before.energy)
        self.isomers[smiles] = FoundIsomer(smiles, *best, times, smiles not in self.known)
        return smiles

    @property
    def valid(self) -> int:
        """How many of the judged molecules are valid."""
        return self.judged - sum(self.faults.values())

    @property
    def ranked(self) -> list[FoundIsomer]:
        """From the lowest energy to the highest."""
        return sorted(self.isomers.values(), key=lambda isomer: isomer.energy)


def _kind(fault: str) -> str:
    """Return a reason without the numbers of its atoms, so that equal reasons count together."""
    if fault.startswith("atom "):
        return "an atom has too many neighbours"
    if fault.startswith("atoms "):
        return "atoms are on top of each other"
    return fault.partition("\n")[0]


def harvest(
    molecules: Sequence[Geometry],
    judge: Judge,
    known: Iterable[str] = (),
    title: str = "relaxing",
    portion: int = _PORTION,
) -> Harvest:
    """Judge molecules, ``portion`` at a time with a progress bar, and return the isomers among them."""
    found = Harvest(frozenset(known))
    starts = range(0, len(molecules), portion)
    for start in track(starts, title, len(starts)):
        part = molecules[start : start + portion]
        for (numbers, _), judgement in zip(part, judge(part), strict=True):
            found.add(numbers, judgement)
    return found


def load_builder(path: Path | None) -> tuple[MoleculeBuilder, frozenset[str]]:
    """Return a builder and the SMILES that it was taught with; the one that comes with flowbridge for None.

    Raises:
        ModelFileError: when the file cannot be read.
        ConfigurationError: when it holds something else.
    """
    file = path or Path(str(files("flowbridge") / "models" / "molecules_cnof.flow"))
    model = load(file)
    if not isinstance(model, MoleculeBuilder):
        raise ConfigurationError(
            f"{file}: holds a {type(model).__name__}, not a builder of molecules: give another file"
        )
    return model, frozenset(read_header(file).provenance.get(KNOWN, ()))


def build(request: BuildRequest, spread: Spread | None = None) -> Harvest:
    """Build, relax and rank molecules, and write ``isomers.db``, ``isomers.sdf``, ``results.json`` and ``report.html``.

    In ``workflows`` lies what ``flowbridge run`` needs for each isomer that MMFF94 has parameters for.
    What was evaluated is kept in ``judgements.sqlite``: a run that was stopped is repeated without evaluating anything twice.

    Args:
        request: what to build.
        spread: processes or Dask workers that evaluate energies; here, one after the other, when None.

    Raises:
        ConfigurationError: for a formula that no molecule has, a calculator or model that there is not.
    """
    from .handover import write_workflows
    from .report import write_report

    formula = Formula.parse(request.formula)
    builder, known = load_builder(request.model)
    request.output.mkdir(parents=True, exist_ok=True)
    judge = MoleculeJudge(request.calculator, JudgeSettings(), spread=spread, file=request.output / "judgements.sqlite")
    built = builder.sample(formula, request.count, torch.Generator().manual_seed(request.seed))
    molecules = [built.molecule(index) for index in range(request.count)]
    portion = _PORTION if spread is None else request.count  # workers are started once
    found = harvest(molecules, judge, known, f"relaxing {formula}", portion)
    write_database(found.ranked, request.output / "isomers.db", request)
    sdf: list[tuple[Any, dict[str, str | float]]] = [
        (molecule_of(i.numbers, i.bonds, i.positions), {"SMILES": i.smiles, "energy_eV": i.energy})
        for i in found.ranked
    ]
    write_sdf(str(request.output / "isomers.sdf"), sdf)
    without = write_workflows(found.ranked, str(formula), request.output / "workflows")
    _write_results(found, request, formula, without)
    write_report(found, formula, judge.description, request.output / "report.html")
    return found


def write_database(isomers: Sequence[FoundIsomer], path: Path, request: BuildRequest) -> None:
    """Write isomers to a new ASE database, with keys ``smiles``, ``method``, ``rank``, ``times``, ``novel``."""
    part = path.with_name(f".part.{path.name}")  # ASE goes by the ending
    part.unlink(missing_ok=True)
    with connect(part) as database:
        for rank, isomer in enumerate(isomers, 1):
            atoms = Atoms(numbers=isomer.numbers, positions=isomer.positions * nm)
            atoms.calc = SinglePointCalculator(atoms, energy=isomer.energy)
            database.write(
                atoms,
                smiles=isomer.smiles,
                method=request.calculator,
                rank=rank,
                times=isomer.times,
                novel=isomer.novel,
            )
        database.metadata = {"title": f"isomers of {request.formula}", "request": _plain(request)}
    part.replace(path)


def _plain(request: BuildRequest) -> dict[str, Any]:
    values = asdict(request)
    return {**values, "output": str(request.output), "model": None if request.model is None else str(request.model)}


def _write_results(found: Harvest, request: BuildRequest, formula: Formula, without: list[str]) -> None:
    results = {
        "formula": str(formula),
        "request": _plain(request),
        "built": found.judged,
        "valid": found.valid,
        "isomers": len(found.isomers),
        "novel": sum(isomer.novel for isomer in found.ranked),
        "evaluations": found.evaluations,
        "faults": dict(found.faults.most_common()),
        "without_mmff_parameters": without,
        "ranking": [
            {"smiles": i.smiles, "energy_eV": i.energy, "times": i.times, "novel": i.novel} for i in found.ranked
        ],
    }
    (request.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def build_and_print(request: BuildRequest, spread: Spread | None = None, shown: int = 15) -> None:
    """Build, and print the best isomers; arguments and errors as of :func:`build`."""
    found = build(request, spread)
    console = Console()
    table = Table("rank", "eV above", "isomer", "found", "", box=None)
    for rank, isomer in enumerate(found.ranked[:shown], 1):
        above = isomer.energy - found.ranked[0].energy
        table.add_row(str(rank), f"{above:.3f}", isomer.smiles, str(isomer.times), "new" if isomer.novel else "")
    console.print(table)
    console.print(
        f"{found.valid} of {found.judged} molecules valid, {len(found.isomers)} isomers, "
        f"{sum(isomer.novel for isomer in found.ranked)} not taught, {found.evaluations} energy evaluations"
    )
    for fault, count in found.faults.most_common():
        console.print(f"  {count}: {fault}", markup=False)
    console.print(f"{request.output / 'report.html'}", markup=False)
