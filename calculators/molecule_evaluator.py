"""Evaluation of molecules by any ASE calculator: relaxation, energies, faults with a reason, results stored on disk."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from ase.units import nm
from threadpoolctl import ThreadpoolController

from ..core.errors import ConfigurationError, MissingDependencyError
from ..core.execution.executors import Executor
from ..flows.molecules.training.evaluation import Evaluation, Geometry
from .evaluation_file import EvaluationFile

CalculatorSource = str | Callable[[], Any]
"""``gfn2``, ``gfn1``, the path of a model file (``.flow``), ``module:function`` that returns a calculator, or a function."""

_TBLITE = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB"}
_NEAREST = 0.05  # nm; no method can start from closer nuclei, and some hang
_JOBS_PER_WORKER = 4


@dataclass(frozen=True)
class EvaluatorSettings:
    """Settings of the evaluation of molecules.

    Attributes:
        relax: whether to relax to the nearest minimum first (BFGS).
        force: largest force at the end of a relaxation, eV/Å.
        steps: largest number of steps of a relaxation; a molecule that is not at rest then is a fault.
        largest_step: largest step of an atom, Å.
        seconds: largest time for one molecule, s.
    """

    relax: bool = True
    force: float = 0.05
    steps: int = 250
    largest_step: float = 0.1
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("force", "steps", "largest_step", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} of an evaluator must be positive, got {getattr(self, name)!r}")


class MoleculeEvaluator:
    """A :class:`~flowbridge.flows.molecules.training.evaluation.Evaluator` with an ASE calculator.

    A failure of the calculator (an exception, NaN, a time-out, no minimum) is a fault with a reason. Equal geometries, also
    rotated or shifted ones, are computed once.

    Args:
        calculator: see ``CalculatorSource``; with an ``executor``, a string or a function at the top of a module.
        settings: settings of the evaluation.
        executor: processes or Dask workers; this process where None.
        file: SQLite file that stores every evaluation, also those of killed runs; memory only where None.

    Raises:
        ConfigurationError: for a calculator that cannot be created.
        MissingDependencyError: when its package is not installed.
    """

    def __init__(
        self,
        calculator: CalculatorSource = "gfn2",
        settings: EvaluatorSettings | None = None,
        *,
        executor: Executor | None = None,
        file: Path | None = None,
    ) -> None:
        self.calculator = calculator
        self.settings = settings or EvaluatorSettings()
        self.executor = executor
        make_calculator(calculator)
        self._known = EvaluationFile(file, f"{calculator_name(calculator)} {self.settings}")
        self.evaluations = 0

    @property
    def description(self) -> str:
        """Name of the calculator, for provenance."""
        return calculator_name(self.calculator)

    def __call__(self, molecules: Sequence[Geometry]) -> list[Evaluation]:
        """See :class:`~flowbridge.flows.molecules.training.evaluation.Evaluator`."""
        pairs = [(np.asarray(z, dtype=int), np.asarray(x, dtype=float)) for z, x in molecules]
        found = [self._known.find(*pair) for pair in pairs]
        # The first of equal geometries is computed, and the others are found afterwards.
        first = {self._known.key(*pair): index for index, pair in reversed(list(enumerate(pairs)))}
        missing = sorted(index for index in first.values() if found[index] is None)
        for index, evaluation in self._compute([(index, *pairs[index]) for index in missing]):
            self.evaluations += evaluation.evaluations
            self._known.store(*pairs[index], evaluation)
            found[index] = evaluation
        return [
            evaluation if evaluation is not None else self._stored(*pair)
            for pair, evaluation in zip(pairs, found, strict=True)
        ]

    def _stored(self, numbers: Any, positions: Any) -> Evaluation:
        evaluation = self._known.find(numbers, positions)
        if evaluation is None:
            raise RuntimeError("an evaluation that was just stored is gone: does another program write its file?")
        return evaluation

    def _compute(self, molecules: list[tuple[int, Any, Any]]) -> Iterator[tuple[int, Evaluation]]:
        if self.executor is None:
            for index, numbers, positions in molecules:
                yield index, evaluate_molecule(self.calculator, self.settings, numbers, positions)
            return
        # Neighbours in the list take similar times; interleaved jobs end together.
        count = min(len(molecules), _JOBS_PER_WORKER * self.executor.workers)
        jobs = [_Job(self.calculator, self.settings, molecules[part::count]) for part in range(count)]
        for results in self.executor(_evaluate_all, jobs):
            yield from results


@dataclass(frozen=True)
class _Job:
    calculator: CalculatorSource
    settings: EvaluatorSettings
    molecules: list[tuple[int, Any, Any]]


def _evaluate_all(job: _Job) -> list[tuple[int, Evaluation]]:
    return [(index, evaluate_molecule(job.calculator, job.settings, z, x)) for index, z, x in job.molecules]


def evaluate_molecule(
    source: CalculatorSource, settings: EvaluatorSettings, numbers: Any, positions: Any
) -> Evaluation:
    """Evaluate one molecule; every failure is a fault.

    Args:
        source: source of the calculator; each molecule gets its own calculator.
        settings: settings of the evaluation.
        numbers: atomic numbers ``(N,)``.
        positions: positions ``(N, 3)`` in nm.
    """
    start = np.array(positions, dtype=float)
    invalid = _invalid_geometry(start)
    if invalid is not None:
        return Evaluation(None, start, 0, invalid)
    atoms = Atoms(numbers=numbers, positions=start * nm)
    atoms.calc = make_calculator(source)
    optimiser = BFGS(atoms, logfile=None, maxstep=settings.largest_step) if settings.relax else None
    try:
        with one_thread(), _time_limit(settings.seconds):
            fault = None if optimiser is None else _relax(optimiser, atoms, settings)
            energy = float(atoms.get_potential_energy())
    except _TooLong:
        return Evaluation(None, start, _evaluations(optimiser), f"took longer than {settings.seconds:g} seconds")
    except Exception as error:
        reason = f"the calculator failed ({type(error).__name__}: {error})"
        return Evaluation(None, start, _evaluations(optimiser), reason)
    if fault is None and not np.isfinite(energy):
        fault = f"the energy is {energy}"
    return Evaluation(energy if fault is None else None, atoms.positions / nm, _evaluations(optimiser), fault)


def _evaluations(optimiser: BFGS | None) -> int:
    return 1 if optimiser is None else 1 + int(optimiser.nsteps)


def _relax(optimiser: BFGS, atoms: Atoms, settings: EvaluatorSettings) -> str | None:
    """Relax to a minimum; return the reason for failure, or None."""
    deadline = time.monotonic() + settings.seconds
    for converged in optimiser.irun(fmax=settings.force, steps=settings.steps):
        if not np.isfinite(atoms.get_forces()).all():
            return "forces are not finite"
        if converged:
            return None
        if time.monotonic() > deadline:
            raise _TooLong
    return f"not at rest after {settings.steps} steps of relaxation"


def _invalid_geometry(positions: np.ndarray) -> str | None:
    if not np.isfinite(positions).all():
        return "positions are not finite"
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + np.eye(len(positions))
    if distances.min() < _NEAREST:
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        return f"atoms {i} and {j} are {distances.min():.3f} nm apart"
    return None


class _TooLong(Exception):
    pass


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt longer work. This is impossible in a thread (of a Dask worker), where the relaxation checks the time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@cache
def _threads() -> ThreadpoolController:
    """Return the control of OpenMP's threads, created after the calculators' libraries are loaded.

    For a dozen atoms threads cost more than they gain, and seconds where cores are busy: molecules run in parallel instead.
    """
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Let OpenMP use one thread within a ``with`` block."""
    limited: AbstractContextManager[Any] = _threads().limit(limits=1, user_api="openmp")
    return limited


def calculator_name(source: CalculatorSource) -> str:
    """Return a name for provenance."""
    return source if isinstance(source, str) else f"{source.__module__}:{source.__qualname__}"


def make_calculator(source: CalculatorSource) -> Any:
    """Return a new calculator.

    Raises:
        ConfigurationError: for an unknown source.
        MissingDependencyError: when xTB is asked for and tblite is not installed.
    """
    if not isinstance(source, str):
        return source()
    if source.lower() in _TBLITE:
        try:
            from tblite.ase import TBLite
        except ImportError as error:
            raise MissingDependencyError("xTB energies need tblite: pip install 'flowbridge[molecules]'") from error
        return TBLite(method=_TBLITE[source.lower()], verbosity=0)
    if source.endswith(".flow"):
        from .potential_calculator import PotentialCalculator

        return PotentialCalculator(source)
    module, _, name = source.partition(":")
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"no calculator {source!r} ({error}): give {', '.join(_TBLITE)}, a model file (.flow), or module:function "
            "where the function makes an ASE calculator"
        ) from error
    return maker()
