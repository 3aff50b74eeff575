"""What ``flowbridge isomers`` does: enumerate constitutional isomers, relax them, check them, keep them in an ASE database."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import nm

from ...calculators.molecule_evaluator import (
    EvaluatorSettings,
    calculator_name,
    evaluate_molecule,
    make_calculator,
    one_thread,
)
from ...calculators.vibrations import lowest_frequency
from ...core.errors import ConfigurationError, CoordinateError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...flows.molecules.bonds import find_bonds
from ...flows.molecules.formulas import Formula
from ...integrations.rdkit.isomers import enumerate_isomers
from ...integrations.rdkit.molecular_graphs import canonical_smiles, embed
from ..stages import read_json, write_json

_IMAGINARY = -30.0  # 1/cm; below it a vibration counts as imaginary, above it as the softness that a relaxation leaves
_JOB = 8  # molecules


@dataclass(frozen=True)
class IsomerRequest:
    """Which isomers are made, and how.

    Attributes:
        formulas: whose isomers.
        per_formula: at most so many of each, drawn by ``seed``; None for all.
        calculator: see :data:`~flowbridge.calculators.molecule_evaluator.CalculatorSource`; a string.
        vibrations: share of molecules whose lowest vibration is computed.
        seed: of draws and embeddings.
    """

    formulas: tuple[Formula, ...]
    per_formula: int | None = None
    calculator: str = "gfn2"
    vibrations: float = 0.0
    seed: int = 1


class IsomerCounts(NamedTuple):
    """How many isomers are in the database, failed (by reason), and had their vibrations looked at."""

    kept: int
    failed: dict[str, int]
    vibrations: int
    imaginary: int


@dataclass(frozen=True)
class _Job:
    calculator: str
    vibrations: float
    seed: int
    molecules: tuple[tuple[str, str], ...]  # formula, SMILES


class _Result(NamedTuple):
    formula: str
    smiles: str
    fault: str | None
    numbers: Any = None
    positions: Any = None
    energy: float | None = None
    frequency: float | None = None


def formulas_of_heavy_atoms(heavy: tuple[int, int], most: dict[str, int], unsaturation: int) -> tuple[Formula, ...]:
    """Return all formulas with at least one carbon.

    Args:
        heavy: the least and largest number of heavy atoms.
        most: the largest number of each heavy element; elements that are not named are left out, carbon is not limited.
        unsaturation: the largest number of rings and double bonds.
    """
    found = []
    limits = [range(most.get(element, 0) + 1) for element in ("N", "O", "F")]
    for n, o, f in itertools.product(*limits):
        for carbon in range(max(1, heavy[0] - n - o - f), heavy[1] - n - o - f + 1):
            most_hydrogens = 2 * carbon + n + 2 - f
            for missing in range(unsaturation + 1):
                formula = Formula((max(most_hydrogens - 2 * missing, 0), carbon, n, o, f))
                if most_hydrogens >= 2 * missing and formula.possible:
                    found.append(formula)
    return tuple(sorted(found, key=lambda formula: (formula.heavy_atoms, formula.counts)))


def chosen_formulas(
    formulas: Sequence[str], heavy_atoms: tuple[int, int] | None, most: str, unsaturation: int, exclude: Sequence[str]
) -> tuple[Formula, ...]:
    """Return the formulas that options of the command line stand for; raises ConfigurationError for what cannot be read."""
    if bool(formulas) == (heavy_atoms is not None):
        raise ConfigurationError("give either formulas, or --heavy-atoms LEAST MOST")
    if heavy_atoms is None:
        found = tuple(Formula.parse(text) for text in formulas)
    else:
        limits = {symbol: int(count or 1) for symbol, count in re.findall(r"([NOF])(\d*)", most)}
        if "".join(sorted(re.sub(r"\d", "", most))) != "".join(sorted(limits)):
            raise ConfigurationError(f"cannot read the limits {most!r}: write them as N2O2F1")
        found = formulas_of_heavy_atoms(heavy_atoms, limits, unsaturation)
    left_out = {Formula.parse(text) for text in exclude}
    return tuple(formula for formula in found if formula not in left_out)


def make_and_print(request: IsomerRequest, path: Path, executor: Executor | None = None) -> None:
    """Make isomers and print how many there are; arguments and errors as of :func:`make_isomers`."""
    counts = make_isomers(request, path, executor)
    print(f"{path}: {counts.kept} relaxed isomers of {len(request.formulas)} formulas")
    for reason, count in sorted(counts.failed.items(), key=lambda item: -item[1]):
        print(f"  left out: {count} ({reason})")
    if counts.vibrations:
        print(f"  vibrations: {counts.vibrations} looked at, {counts.imaginary} with an imaginary one")


def make_isomers(request: IsomerRequest, path: Path, executor: Executor | None = None) -> IsomerCounts:
    """Enumerate, relax and store isomers; go on where an earlier call stopped.

    A molecule is kept when its relaxed geometry has the bonds it started with. What was tried and failed is written next to the
    database (``NAME.failures.json``), and not tried again.

    Args:
        request: what to make; a database of another request is refused.
        path: of the ASE database (``.db``).
        executor: processes or Dask workers; here, one after the other, when None.

    Raises:
        ConfigurationError: for a request without formulas, or a database of another request.
    """
    if not request.formulas:
        raise ConfigurationError("there are no formulas to make isomers of: name some, or widen the limits")
    make_calculator(request.calculator)
    path.parent.mkdir(parents=True, exist_ok=True)
    failures_path = path.with_suffix(".failures.json")
    failures: dict[str, str] = read_json(failures_path) or {}
    with connect(path) as database:
        _require_same_request(database, request, path)
        done = {row.smiles for row in database.select()} | failures.keys()
    wanted = [(str(formula), smiles) for formula in request.formulas for smiles in _chosen(formula, request)]
    missing = [pair for pair in wanted if pair[1] not in done]
    jobs = [
        _Job(request.calculator, request.vibrations, request.seed, tuple(missing[start : start + _JOB]))
        for start in range(0, len(missing), _JOB)
    ]
    results = map(_relax_all, jobs) if executor is None else executor(_relax_all, jobs)
    for part in track(results, "relaxing isomers", len(jobs)):
        with connect(path) as database:
            for result in part:
                if result.fault is None:
                    _write(database, result, request.calculator)
                else:
                    failures[result.smiles] = result.fault
        if failures:
            write_json(failures_path, dict(sorted(failures.items())))
    return _count(path, failures)


def _chosen(formula: Formula, request: IsomerRequest) -> list[str]:
    isomers = enumerate_isomers(formula)
    if request.per_formula is None or len(isomers) <= request.per_formula:
        return isomers
    return sorted(random.Random(f"{request.seed} {formula}").sample(isomers, request.per_formula))


def _require_same_request(database: Any, request: IsomerRequest, path: Path) -> None:
    asked = {"calculator": request.calculator, "seed": request.seed, "vibrations": request.vibrations}
    metadata = dict(database.metadata)
    before = metadata.get("request", asked)
    if before != asked:
        raise ConfigurationError(
            f"{path}: was made with {before}, not {asked}: name another file, or repeat that request"
        )
    software = {name: version(name) for name in ("flowbridge", "ase", "rdkit")}
    if request.calculator in ("gfn2", "gfn1"):
        software["tblite"] = version("tblite")
    metadata.update(request=asked, relaxation=asdict(EvaluatorSettings()), software=software, title="relaxed isomers")
    database.metadata = metadata


def _relax_all(job: _Job) -> list[_Result]:
    return [_relax(job, formula, smiles) for formula, smiles in job.molecules]


def _relax(job: _Job, formula: str, smiles: str) -> _Result:
    random_number = int.from_bytes(hashlib.sha256(f"{job.seed} {smiles}".encode()).digest()[:4], "big")
    try:
        start = embed(smiles, random_number % 2**31)
    except CoordinateError:
        return _Result(formula, smiles, "no structure by distance geometry")
    verdict = evaluate_molecule(job.calculator, EvaluatorSettings(), *start)
    if verdict.fault is not None:
        return _Result(formula, smiles, verdict.fault)
    bonds = find_bonds(start.numbers, verdict.positions)
    if bonds.fault is not None:
        return _Result(formula, smiles, "relaxes to no valid molecule")
    if canonical_smiles(start.numbers, bonds.bonds) != smiles:
        return _Result(formula, smiles, "relaxes to another isomer")
    frequency = None
    if (random_number >> 8) % 10_000 < 10_000 * job.vibrations:
        atoms = Atoms(
            numbers=start.numbers, positions=verdict.positions * nm, calculator=make_calculator(job.calculator)
        )
        with one_thread():
            frequency = lowest_frequency(atoms)
    return _Result(formula, smiles, None, start.numbers, verdict.positions, verdict.energy, frequency)


def _write(database: Any, result: _Result, calculator: str) -> None:
    atoms = Atoms(numbers=result.numbers, positions=result.positions * nm)
    atoms.calc = SinglePointCalculator(atoms, energy=result.energy)
    values: dict[str, Any] = {"smiles": result.smiles, "method": calculator_name(calculator)}
    if result.frequency is not None:
        values["lowest_frequency"] = result.frequency
    database.write(atoms, **values)


def _count(path: Path, failures: dict[str, str]) -> IsomerCounts:
    with connect(path) as database:
        frequencies = [row.get("lowest_frequency") for row in database.select()]
    reasons: dict[str, int] = {}
    for reason in failures.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    looked_at = [frequency for frequency in frequencies if frequency is not None]
    imaginary = sum(frequency < _IMAGINARY for frequency in looked_at)
    return IsomerCounts(len(frequencies), reasons, len(looked_at), imaginary)


class StoredIsomer(NamedTuple):
    """A molecule of a database: SMILES, formula, atomic numbers ``(N,)``, positions ``(N, 3)`` in nm, energy in eV."""

    smiles: str
    formula: Formula
    numbers: np.ndarray
    positions: np.ndarray
    energy: float


def read_isomers(path: Path) -> list[StoredIsomer]:
    """Return the molecules of a database that :func:`make_isomers` or ``flowbridge build`` wrote.

    Raises:
        ConfigurationError: when there is no such file, it is empty, or no such database.
    """
    if not path.is_file():
        raise ConfigurationError(f"there is no database {path}: make one with 'flowbridge isomers'")
    isomers = list(_rows(path))
    if not isomers:
        raise ConfigurationError(f"{path}: holds no molecules; make some with 'flowbridge isomers'")
    return isomers


def _rows(path: Path) -> Iterator[StoredIsomer]:
    try:
        with connect(path) as database:
            rows = list(database.select())
    except Exception as error:  # sqlite3's own, and ASE's for its other formats
        raise ConfigurationError(f"{path}: cannot be read as an ASE database ({error})") from error
    for row in rows:
        smiles = row.get("smiles")
        if smiles is None or row.get("energy") is None:
            raise ConfigurationError(
                f"{path}: row {row.id} has no smiles or no energy: it was not written by flowbridge"
            )
        yield StoredIsomer(
            smiles, Formula.of_atomic_numbers(row.numbers), row.numbers, row.positions / nm, float(row.energy)
        )
