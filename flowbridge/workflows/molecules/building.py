"""What ``flowbridge build`` does: build molecules of a formula, relax them, and keep one of each isomer, ranked by energy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import nm
from rich.console import Console
from rich.table import Table

from ...calculators.molecule_evaluator import EvaluatorSettings, MoleculeEvaluator
from ...core.errors import ConfigurationError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...core.model_files.files import load, read_header
from ...flows.molecules.builder import MoleculeBuilder
from ...flows.molecules.formulas import Formula
from ...integrations.rdkit.molecular_graphs import molecule_of, write_sdf
from .novelty import Taught
from .results import FoundIsomer, IsomerResults
from .search import Candidates, Search

_BATCH = 100  # molecules that are built together
_PORTIONS = 4  # times the number of workers: molecules that are evaluated together


@dataclass(frozen=True)
class BuildRequest:
    """What is built.

    Attributes:
        formula: such as ``C3H5NO2``.
        output: folder for results.
        count: molecules to build.
        evaluations: of energies at most, to the end of the relaxation that passes them; as many as it takes when None.
        starts: geometries that each isomer is relaxed from at most.
        ranked: relax first what should be low by what the builder knows of energies; otherwise in the order of building.
        model: file of a builder; the one that comes with flowbridge when None.
        calculator: see :data:`~flowbridge.calculators.molecule_evaluator.CalculatorSource`; a string.
        seed: of everything random.
    """

    formula: str
    output: Path
    count: int = 200
    model: Path | None = None
    calculator: str = "gfn2"
    seed: int = 1
    evaluations: int | None = None
    starts: int = 1
    ranked: bool = True


def load_builder(path: Path | None) -> tuple[MoleculeBuilder, Taught]:
    """Return a builder and what it was taught with; the one that comes with flowbridge for None.

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
    return model, Taught.from_provenance(read_header(file).provenance)


def build(request: BuildRequest, executor: Executor | None = None) -> tuple[Candidates, IsomerResults]:
    """Build molecules, relax their isomers, and write ``isomers.db``, ``isomers.sdf``, ``results.json`` and ``report.html``.

    In ``workflows`` lies what ``flowbridge run`` needs for each isomer that MMFF94 has parameters for.
    What was evaluated is kept in ``evaluations.sqlite``: a run that was stopped is repeated without evaluating anything twice.

    Args:
        request: what to build.
        executor: processes or Dask workers that evaluate energies; here, one after the other, when None.

    Raises:
        ConfigurationError: for a formula that no molecule has, a calculator or model that there is not.
    """
    from .export import write_workflows
    from .report import write_report

    formula = Formula.parse(request.formula)
    for name in ("count", "starts"):
        if getattr(request, name) < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {getattr(request, name)}")
    builder, taught = load_builder(request.model)
    request.output.mkdir(parents=True, exist_ok=True)
    evaluator = MoleculeEvaluator(
        request.calculator, EvaluatorSettings(), executor=executor, file=request.output / "evaluations.sqlite"
    )
    candidates = built_candidates(builder, formula, request.count, request.seed)
    found = IsomerResults(taught)
    search = Search(formula, evaluator, found, builder.energies if request.ranked else None, request.starts)
    # Workers are started for each portion: without a limit there is one.
    portion = (
        1
        if executor is None
        else _PORTIONS * executor.workers
        if request.evaluations
        else request.count * request.starts
    )
    total = sum(min(len(starts), request.starts) for starts in candidates.isomers.values())
    for _ in track(search.run(candidates, request.evaluations, portion), f"relaxing {formula}", -(-total // portion)):
        pass
    search.count_builds(candidates)
    write_database(found.ranked, request.output / "isomers.db", request)
    sdf: list[tuple[Any, dict[str, str | float]]] = [
        (molecule_of(i.numbers, i.bonds, i.positions), {"SMILES": i.smiles, "energy_eV": i.energy})
        for i in found.ranked
    ]
    write_sdf(str(request.output / "isomers.sdf"), sdf)
    without = write_workflows(found.ranked, str(formula), request.output / "workflows")
    _write_results(found, candidates, request, formula, without)
    write_report(found, candidates, formula, evaluator.description, request.output / "report.html")
    return candidates, found


def built_candidates(builder: MoleculeBuilder, formula: Formula, count: int, seed: int) -> Candidates:
    """Build molecules and return the isomers among them.

    Args:
        builder: any.
        formula: of all.
        count: of molecules.
        seed: of everything random.
    """
    candidates, generator = Candidates(), torch.Generator().manual_seed(seed)
    sizes = [min(_BATCH, count - start) for start in range(0, count, _BATCH)]
    for size in track(sizes, f"building {formula}", len(sizes)):
        built = builder.sample(formula, size, generator)
        candidates.add(built.molecule(index) for index in range(size))
    return candidates


def write_database(isomers: Sequence[FoundIsomer], path: Path, request: BuildRequest) -> None:
    """Write isomers to a new ASE database, with keys ``smiles``, ``method``, ``rank``, and those of :class:`FoundIsomer`."""
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
                novel_geometry=isomer.novel_geometry,
            )
        database.metadata = {"title": f"isomers of {request.formula}", "request": _plain(request)}
    part.replace(path)


def _plain(request: BuildRequest) -> dict[str, Any]:
    values = asdict(request)
    return {**values, "output": str(request.output), "model": None if request.model is None else str(request.model)}


def _write_results(
    found: IsomerResults, candidates: Candidates, request: BuildRequest, formula: Formula, without: list[str]
) -> None:
    results = {
        "formula": str(formula),
        "request": _plain(request),
        "built": candidates.built,
        "valid_as_built": candidates.valid,
        "isomers_as_built": len(candidates.isomers),
        "relaxed": found.evaluated,
        "valid": found.valid,
        "isomers": len(found.isomers),
        "novel": sum(isomer.novel for isomer in found.ranked),
        "novel_geometries": sum(isomer.novel_geometry for isomer in found.ranked),
        "evaluations": found.evaluations,
        "faults_as_built": dict(candidates.faults.most_common()),
        "faults": dict(found.faults.most_common()),
        "without_mmff_parameters": without,
        "ranking": [
            {
                "smiles": i.smiles,
                "energy_eV": i.energy,
                "times": i.times,
                "novel": i.novel,
                "novel_geometry": i.novel_geometry,
            }
            for i in found.ranked
        ],
    }
    (request.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def build_and_print(request: BuildRequest, executor: Executor | None = None, shown: int = 15) -> None:
    """Build, and print the best isomers; arguments and errors as of :func:`build`."""
    candidates, found = build(request, executor)
    console = Console()
    table = Table("rank", "eV above", "isomer", "built", "", box=None)
    for rank, isomer in enumerate(found.ranked[:shown], 1):
        above = isomer.energy - found.ranked[0].energy
        new = "new" if isomer.novel else "new geometry" if isomer.novel_geometry else ""
        table.add_row(str(rank), f"{above:.3f}", isomer.smiles, str(isomer.times), new)
    if len(found.ranked) > shown:
        table.add_row("...", "", f"{len(found.ranked) - shown} more on the page", "", "")
    console.print(table)
    console.print(
        f"{candidates.valid} of {candidates.built} molecules valid as built, {len(candidates.isomers)} isomers; "
        f"{found.evaluated} relaxed, {found.valid} valid, {len(found.isomers)} isomers, "
        f"{sum(isomer.novel for isomer in found.ranked)} not taught, {found.evaluations} energy evaluations"
    )
    for faults, when in ((candidates.faults, "as built"), (found.faults, "relaxed")):
        for fault, count in faults.most_common():
            console.print(f"  {count} {when}: {fault}", markup=False)
    console.print(f"{request.output / 'report.html'}", markup=False)
