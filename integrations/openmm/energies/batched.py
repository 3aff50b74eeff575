"""Energies and forces of many configurations of one System, on all cores."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from typing import NamedTuple, cast

import numpy as np
import openmm

from ....core.errors import ConfigurationError
from .batch import ConfigurationBatch, FloatArray
from .context_pools import ContextPool, SingleContext
from .plans import EvaluationPlan, PlanConstraints, WorkerKind, fastest_plan, stored_plan

_FEW = 16  # configurations that are done before a second worker is awake
_PATIENCE = 1.0  # seconds of work with a single Context before plans are timed
_SAMPLE = 200  # configurations that plans are timed with


class EnergyEvaluation(NamedTuple):
    """Results of a batch.

    Attributes:
        energies: ``(B,)`` kJ/mol, NaN where there is none.
        forces: ``(B, N, 3)`` kJ/mol/nm, NaN where the energy is.
        failures: reason for every missing energy, by index.
    """

    energies: FloatArray
    forces: FloatArray
    failures: dict[int, str]


class SystemEnergy(ABC):
    """Batched energies of one System; subclasses decide where they are computed.

    Args:
        system: the System; later changes are not seen.
    """

    def __init__(self, system: openmm.System) -> None:
        self._system = system
        self.particles: int = system.getNumParticles()
        self.periodic: bool = system.usesPeriodicBoundaryConditions()
        self._lock = threading.Lock()

    def energies(self, positions: FloatArray, cell: FloatArray | None = None) -> FloatArray:
        """Return energies ``(B,)`` kJ/mol without evaluating forces; arguments and NaN as for :meth:`evaluate`."""
        return self.evaluated(positions, cell, forces=False).energies

    def energies_and_forces(
        self, positions: FloatArray, cell: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` kJ/mol and forces ``(B, N, 3)`` kJ/mol/nm; arguments and NaN as for :meth:`evaluate`."""
        energies, forces, _ = self.evaluate(positions, cell)
        return energies, forces

    def evaluate(
        self,
        positions: FloatArray,
        cell: FloatArray | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
        stop: threading.Event | None = None,
    ) -> EnergyEvaluation:
        """Evaluate configurations.

        A configuration with a position or an energy that is not finite, or for which OpenMM fails or crashes, has NaN in
        energy and forces and its reason in ``failures``; it never disturbs the others.

        Args:
            positions: ``(B, N, 3)`` nm.
            cell: for a periodic System, box vectors ``(B, 3, 3)`` or ``(3, 3)`` nm, row vectors in OpenMM's reduced form;
                the System's default where None.
            progress: function of the number of configurations done and their total, called as results arrive. An exception
                from it ends the evaluation; so does Ctrl-C.
            stop: event that another thread, a signal handler or ``progress`` may set: the results so far are returned at
                once, the rest as failures.

        Raises:
            ConfigurationError: for positions or cells of another shape, or a cell for a System without one.
            WorkerError: when requested worker processes cannot work.
        """
        batch = self.evaluated(positions, cell, progress=progress, stop=stop)
        forces = cast(FloatArray, batch.forces)
        return EnergyEvaluation(batch.energies, forces, dict(sorted(batch.failures.items())))

    def evaluated(
        self,
        positions: FloatArray,
        cell: FloatArray | None = None,
        *,
        forces: bool = True,
        progress: Callable[[int, int], object] | None = None,
        stop: threading.Event | None = None,
    ) -> ConfigurationBatch:
        """Return configurations with their results, without forces if ``forces`` is False; see :meth:`evaluate`."""
        batch = ConfigurationBatch.checked(positions, cell, self.particles, self.periodic, forces)
        done = np.zeros(len(batch), dtype=bool)
        with self._lock, closing(self._work(batch)) as work:
            for first, last in work:
                done[first:last] = True
                if progress is not None:
                    progress(int(done.sum()), len(batch))
                if stop is not None and stop.is_set():
                    break
        for index in np.flatnonzero(~done):
            batch.fail(int(index), "not evaluated: the evaluation was stopped before")
        return batch

    @abstractmethod
    def _work(self, batch: ConfigurationBatch) -> Generator[tuple[int, int], None, None]:
        """Evaluate a batch; yield each range when it is done."""


class OpenMMEnergy(SystemEnergy):
    """Batched energies of an OpenMM System: several Contexts at once, raw buffers, no unit objects.

    Two implicit-solvent models of one molecule can want opposite platforms (an OBC model that OpenMM has as a force of its
    own is fastest on Reference, one built from CustomGBForce ten times faster on CPU), and threads scale only where a
    configuration takes long enough. The possible plans are therefore timed after the first second of work, and the fastest
    is stored for this System and machine in the user's cache folder. Reference works in double precision, the CPU platform in
    single (about 1e-4 kJ/mol).

    An evaluator may be used from several threads, which take turns.

    Args:
        system: the System; later changes are not seen.
        platform: name of the OpenMM platform; the fastest where None.
        workers: number of Contexts; where None, as many as there are cores, or one where that is faster.
        kind: ``"threads"`` of this process or ``"processes"`` of their own for several Contexts; the faster where None.
            Processes need no ``if __name__ == "__main__"`` in scripts. A single process, where it and the platform are named,
            protects this process from a crash of OpenMM.
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str | None = None,
        workers: int | None = None,
        kind: WorkerKind | None = None,
    ) -> None:
        super().__init__(system)
        self._constraints = PlanConstraints(platform, workers, kind)
        self._plan = self._constraints.only_plan()
        self._looked_up = self._plan is not None
        self._single: SingleContext | None = None
        self._pool: ContextPool | None = None
        self._spent = 0.0

    @property
    def plan(self) -> EvaluationPlan | None:
        """The chosen plan; None before plans were timed."""
        return self._plan

    def settle(self, positions: FloatArray, cell: FloatArray | None = None) -> None:
        """Choose the plan now, with these configurations, so that all later ones are computed in the same way.

        Arguments and errors as for :meth:`evaluate`.
        """
        batch = ConfigurationBatch.checked(positions, cell, self.particles, self.periodic)
        with self._lock:
            self._look_up()
            if self._plan is None:
                self._choose_plan(batch)

    def close(self) -> None:
        """End worker processes; they also end with this object, and the next evaluation starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def __reduce__(self) -> tuple[type[OpenMMEnergy], tuple[object, ...]]:
        """Copy and pickle as the System and the arguments: Contexts belong to their process."""
        given = self._constraints
        return type(self), (self._system, given.platform, given.workers, given.kind)

    def _work(self, batch: ConfigurationBatch) -> Generator[tuple[int, int], None, None]:
        """Evaluate by the plan, or in this thread until enough work was done to time the plans."""
        self._look_up()
        done = 0
        if self._plan is None or (len(batch) < _FEW and not self._plan.isolated):
            begin = time.perf_counter()
            for first, last in self._single_context().evaluate(batch):
                done = last
                yield first, last
                self._spent += time.perf_counter() - begin
                begin = time.perf_counter()
                if self._plan is None and self._spent > _PATIENCE:
                    self._choose_plan(batch)
                    break
        if done < len(batch):
            yield from self._planned_pool().evaluate(batch, done)

    def _look_up(self) -> None:
        if not self._looked_up:
            self._looked_up, self._plan = True, stored_plan(self._system, self._constraints)

    def _choose_plan(self, batch: ConfigurationBatch) -> None:
        sample = batch.usable_sample(_SAMPLE)
        if len(sample):
            self._plan = fastest_plan(self._system, self._constraints, sample)
            self._single = None  # perhaps on another platform

    def _single_context(self) -> SingleContext:
        if self._single is None:
            plan = self._plan or self._constraints.default_plan()
            self._single = SingleContext(self._system, plan.platform)
        return self._single

    def _planned_pool(self) -> ContextPool:
        if self._plan is None or (self._plan.workers == 1 and not self._plan.isolated):
            return self._single_context()
        if self._pool is None:
            self._pool = self._plan.pool(self._system)
        return self._pool


def energy_from_openmm(system: object) -> OpenMMEnergy:
    """Return an evaluator for an ``openmm.System``; raises ConfigurationError for anything else of OpenMM."""
    if not isinstance(system, openmm.System):
        raise ConfigurationError(f"cannot evaluate energies of an openmm.{type(system).__name__}: give the System")
    return OpenMMEnergy(system)
