"""``flowbridge build``: build molecules of a formula, relax them, and keep one of each isomer, ranked by energy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import nm

from ...calculators.molecule_evaluator import EvaluatorSettings, MoleculeEvaluator, make_calculator
from ...core.errors import ConfigurationError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...core.model_files.files import load, read_header
from ...flows.molecules.bonds import find_bonds
from ...flows.molecules.builder import MoleculeBuilder
from ...flows.molecules.formulas import Formula
from ...integrations.mdtraj.trajectories import digest_of_file
from ...integrations.rdkit.molecular_graphs import molecule_of, write_sdf
from ..runner import Pipeline, Selection, run_pipeline
from ..stages import Done, Row, Stage, StageFolder, Written
from .export import write_workflows
from .novelty import Taught
from .report import isomers_page
from .results import FoundIsomer, IsomerResults
from .search import Candidates, Search

_BATCH = 100  # molecules that are built together
_SHOWN = 15  # isomers in the table at the end
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
        seed: random seed.
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
    file = _builder_file(path)
    model = load(file)
    if not isinstance(model, MoleculeBuilder):
        raise ConfigurationError(
            f"{file}: holds a {type(model).__name__}, not a builder of molecules: give another file"
        )
    return model, Taught.from_provenance(read_header(file).provenance)


def build_isomers(
    request: BuildRequest, executor: Executor | None = None, selection: Selection | None = None
) -> dict[str, Any]:
    """Build molecules, relax their isomers, and write ``isomers.db``, ``isomers.sdf``, ``results.json`` and ``report.html``.

    In ``workflows`` lies what ``flowbridge run`` needs for each isomer that MMFF94 has parameters for.
    What was evaluated is kept in ``evaluations.sqlite``: a run that was stopped is repeated without evaluating anything twice.

    Args:
        request: what to build.
        executor: processes or Dask workers that evaluate energies; here, one after the other, when None.
        selection: stages that are asked for; all by default.

    Raises:
        ConfigurationError: for a formula that no molecule has, a calculator or model that does not exist.
    """
    formula = Formula.parse(request.formula)
    for name in ("count", "starts"):
        if getattr(request, name) < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {getattr(request, name)}")
    load_builder(request.model)
    make_calculator(request.calculator)
    source = Path(request.calculator)
    inputs = {
        **{key: value for key, value in _plain(request).items() if key not in ("output", "model")},
        "model": read_header(_builder_file(request.model)).digest,
        "calculator_digest": digest_of_file(source) if source.suffix == ".flow" else None,
    }
    for old in (request.output / "workflows").glob(f"{formula}_*.*"):  # another run may have written more of them
        old.unlink()
    pipeline = Pipeline(
        kind="molecules",
        title=f"isomers of {formula}",
        output=request.output,
        stages=(
            Stage(
                "relax", "isomers, relaxed and ranked", lambda folder, _: _relax(request, formula, executor, folder), inputs,
                writes=(Written("isomers.db", "the isomers, as an ASE database"),), summary=_summary,
            ),
            Stage(
                "export", "structures, and workflows with MMFF94",
                lambda folder, done: _export(request, formula, done, folder), {}, ("relax",),
                (
                    Written("isomers.sdf", "the same for RDKit and others"),
                    Written("workflows", "what flowbridge run needs for each"),
                ),
            ),
        ),
        goal="relax",
        headline={"formula": str(formula), "request": _plain(request)},
        page=lambda outcome: isomers_page(load_isomers(outcome.done["relax"]), outcome.results, formula),
    )  # fmt: skip
    return run_pipeline(pipeline, selection)


def _relax(request: BuildRequest, formula: Formula, executor: Executor | None, folder: Path) -> dict[str, Any]:
    """Build and relax, and keep the isomers in ``isomers.db``."""
    builder, taught = load_builder(request.model)
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
    write_database(found.ranked, folder / "isomers.db", request)
    return {
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


def _summary(results: Mapping[str, Any]) -> Iterator[Row]:
    ranking = results["ranking"]
    for rank, isomer in enumerate(ranking[:_SHOWN], 1):
        above = isomer["energy_eV"] - ranking[0]["energy_eV"]
        new = "new" if isomer["novel"] else "new geometry" if isomer["novel_geometry"] else ""
        yield Row(f"{rank}. {isomer['smiles']}", f"+{above:.3f} eV", f"built {isomer['times']} times {new}".rstrip())
    if len(ranking) > _SHOWN:
        yield Row(f"{len(ranking) - _SHOWN} more in the report", "")
    built = f"{results['valid_as_built']} of {results['built']} molecules valid as built"
    yield Row("built", str(results["built"]), f"{built}, {results['isomers_as_built']} isomers")
    yield Row("relaxed", str(results["relaxed"]), f"{results['valid']} valid, {results['isomers']} isomers")
    yield Row("not taught", str(results["novel"]))
    yield Row("energy evaluations", str(results["evaluations"]))
    for key, when in (("faults_as_built", "as built"), ("faults", "relaxed")):
        for fault, count in results[key].items():
            yield Row(f"{when}: {fault}", str(count))


def load_isomers(relaxed: StageFolder) -> list[FoundIsomer]:
    """Return the isomers that the stage ``relax`` kept, from the lowest energy to the highest."""
    with connect(relaxed.folder / "isomers.db") as database:
        rows = sorted(database.select(), key=lambda row: row.rank)
    return [
        FoundIsomer(
            row.smiles, row.numbers, row.positions / nm, find_bonds(row.numbers, row.positions / nm).bonds,
            float(row.energy), row.times, bool(row.novel), bool(row.novel_geometry),
        )
        for row in rows
    ]  # fmt: skip


def _export(request: BuildRequest, formula: Formula, done: Done, folder: Path) -> dict[str, Any]:
    """Write an SDF file, and what ``flowbridge run`` needs for each isomer."""
    isomers = load_isomers(done["relax"])
    sdf: list[tuple[Any, dict[str, str | float]]] = [
        (molecule_of(i.numbers, i.bonds, i.positions), {"SMILES": i.smiles, "energy_eV": i.energy}) for i in isomers
    ]
    write_sdf(str(folder / "isomers.sdf"), sdf)
    return {"without_mmff_parameters": write_workflows(isomers, str(formula), folder / "workflows")}


def _builder_file(path: Path | None) -> Path:
    return path or Path(str(files("flowbridge") / "models" / "molecules_cnof.flow"))


def built_candidates(builder: MoleculeBuilder, formula: Formula, count: int, seed: int) -> Candidates:
    """Build molecules and return the isomers among them.

    Args:
        builder: any.
        formula: of all.
        count: of molecules.
        seed: random seed.
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
