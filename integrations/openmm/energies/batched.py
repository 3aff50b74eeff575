"""Energies and forces of many configurations of one System, at the speed of the cores."""

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
from .frames import FloatArray, Frames
from .plans import Choices, Plan, WorkerKind, choose, remembered
from .teams import SingleTeam, Team

_FEW = 16  # configurations that are done before a second worker is awake
_PATIENCE = 1.0  # seconds of work with a single Context before plans are tried out
_SAMPLE = 200  # configurations that plans are tried with


class EnergyEvaluation(NamedTuple):
    """What a batch gave.

    Attributes:
        energies: ``(B,)`` kJ/mol, NaN where there is none.
        forces: ``(B, N, 3)`` kJ/mol/nm, NaN where the energy is.
        failures: for every configuration without an energy, by its index, the reason.
    """

    energies: FloatArray
    forces: FloatArray
    failures: dict[int, str]


class SystemEnergy(ABC):
    """Batched energies of an OpenMM System, wherever they are computed: a :class:`~flowbridge.core.energy.BatchedEnergy`."""

    def __init__(self, system: openmm.System) -> None:
        self.particles: int = system.getNumParticles()
        self.periodic: bool = system.usesPeriodicBoundaryConditions()
        self._system = system

    def energies(self, positions: FloatArray, cell: FloatArray | None = None) -> FloatArray:
        """Return energies ``(B,)`` kJ/mol without evaluating forces; arguments and NaN as for :meth:`evaluate`."""
        return self.filled(positions, cell, forces=False).energies

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
            progress: called with the number of configurations done and their total as they get done. What it raises ends
                the evaluation; so does Ctrl-C.
            stop: set it, from another thread, a signal handler or ``progress``, and what is done is returned at once, the
                rest as failures.

        Raises:
            ConfigurationError: for positions or cells of another shape, or a cell for a System without one.
            WorkerError: when worker processes were asked for and cannot work.
        """
        frames = self.filled(positions, cell, progress=progress, stop=stop)
        forces = cast(FloatArray, frames.forces)  # as asked for
        return EnergyEvaluation(frames.energies, forces, dict(sorted(frames.failures.items())))

    def filled(
        self,
        positions: FloatArray,
        cell: FloatArray | None = None,
        *,
        forces: bool = True,
        progress: Callable[[int, int], object] | None = None,
        stop: threading.Event | None = None,
    ) -> Frames:
        """Return configurations with their results, forces only where asked for; else as :meth:`evaluate`."""
        frames = self.waiting(positions, cell, forces=forces)
        done = np.zeros(len(frames), dtype=bool)
        with closing(self._work(frames)) as work:
            for first, last in work:
                done[first:last] = True
                if progress is not None:
                    progress(int(done.sum()), len(frames))
                if stop is not None and stop.is_set():
                    break
        for index in np.flatnonzero(~done):
            frames.fail(int(index), "not evaluated: the evaluation was stopped before")
        return frames

    def waiting(self, positions: FloatArray, cell: FloatArray | None, *, forces: bool = True) -> Frames:
        """Return configurations as frames that wait for their results; arguments and errors as for :meth:`evaluate`."""
        given = np.ascontiguousarray(positions, dtype=np.float64)
        if given.ndim != 3 or given.shape[1:] != (self.particles, 3):
            raise ConfigurationError(
                f"positions have shape {given.shape}, expected (configurations, {self.particles}, 3)"
            )
        if cell is None:
            return Frames.waiting(given, None, forces=forces)
        if not self.periodic:
            raise ConfigurationError("a cell was given for a System that is not periodic: leave it out")
        vectors = np.asarray(cell, dtype=np.float64)
        if vectors.shape not in ((3, 3), (len(given), 3, 3)):
            raise ConfigurationError(
                f"the cell has shape {vectors.shape}, expected (3, 3) or ({len(given)}, 3, 3): row vectors in nm"
            )
        cells = np.ascontiguousarray(np.broadcast_to(vectors, (len(given), 3, 3)))
        return Frames.waiting(given, cells, forces=forces)

    @abstractmethod
    def _work(self, frames: Frames) -> Generator[tuple[int, int], None, None]:
        """Evaluate frames and yield the ranges that are done; closing calls off the rest."""


class OpenMMEnergy(SystemEnergy):
    """Batched energies of an OpenMM System: several Contexts at once, raw buffers, no unit objects.

    Two implicit-solvent models of one molecule can want opposite platforms (an OBC model that OpenMM has as a force of its
    own is fastest on Reference, one built from CustomGBForce ten times faster on CPU), and threads scale only where a
    configuration takes long enough, so by default the possible plans are tried out after the first second of work; the
    fastest is remembered for this System and machine in the user's cache folder. Reference works in double precision, the
    CPU platform in single (about 1e-4 kJ/mol).

    An evaluator may be used from several threads, which take turns.

    Args:
        system: the System; not changed, and not kept in sync with later changes.
        platform: name of the OpenMM platform; tried out where None.
        workers: number of Contexts; where None, as many as there are cores, or one where that is faster.
        kind: whether several Contexts are in ``"threads"`` of this process or in ``"processes"`` of their own; tried out
            where None. Processes need no ``if __name__ == "__main__"`` in scripts. A single one, where it and the platform are
            asked for, keeps a crash of OpenMM away from this process.
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str | None = None,
        workers: int | None = None,
        kind: WorkerKind | None = None,
    ) -> None:
        super().__init__(system)
        self._choices = Choices(platform, workers, kind)
        self._plan = self._choices.only()
        self._asked = self._plan is not None
        self._single: SingleTeam | None = None
        self._team: Team | None = None
        self._spent = 0.0
        self._lock = threading.Lock()

    @property
    def plan(self) -> Plan | None:
        """What was chosen; None before plans were tried out."""
        return self._plan

    def settle(self, positions: FloatArray, cell: FloatArray | None = None) -> None:
        """Look for a plan now, with these configurations, so that all that follows is computed in the same way.

        Arguments and errors as for :meth:`evaluate`.
        """
        frames = self.waiting(positions, cell)
        with self._lock:
            self._remember()
            if self._plan is None:
                self._look_for_a_plan(frames)

    def close(self) -> None:
        """End worker processes; they also end with this object, and are started again when they are needed."""
        if self._team is not None:
            self._team.close()

    def __reduce__(self) -> tuple[type[OpenMMEnergy], tuple[object, ...]]:
        """Copy and pickle as the System and the choices: Contexts belong to their process."""
        choices = self._choices
        return type(self), (self._system, choices.platform, choices.workers, choices.kind)

    def _work(self, frames: Frames) -> Generator[tuple[int, int], None, None]:
        """Evaluate frames by the plan, or in this thread until there has been work enough to look for one."""
        with self._lock:
            self._remember()
            done = 0
            if self._plan is None or (len(frames) < _FEW and not self._plan.apart):
                begin = time.perf_counter()
                for first, last in self._alone().run(frames):
                    done = last
                    yield first, last
                    self._spent += time.perf_counter() - begin
                    begin = time.perf_counter()
                    if self._plan is None and self._spent > _PATIENCE:
                        self._look_for_a_plan(frames)
                        break
            if done < len(frames):
                yield from self._all().run(frames, done)

    def _remember(self) -> None:
        if not self._asked:
            self._asked, self._plan = True, remembered(self._system, self._choices)

    def _look_for_a_plan(self, frames: Frames) -> None:
        usable = np.flatnonzero(np.isfinite(frames.positions).all((1, 2)))[:_SAMPLE]
        if len(usable):
            cells = None if frames.cells is None else frames.cells[usable]
            self._plan = choose(self._system, self._choices, Frames.waiting(frames.positions[usable], cells))
            self._single = None  # perhaps on another platform

    def _alone(self) -> SingleTeam:
        if self._single is None:
            plan = self._plan or self._choices.first()
            self._single = SingleTeam(self._system, plan.platform)
        return self._single

    def _all(self) -> Team:
        if self._plan is None or (self._plan.workers == 1 and not self._plan.apart):
            return self._alone()
        if self._team is None:
            self._team = self._plan.team(self._system)
        return self._team


def energy_from_openmm(target: object) -> OpenMMEnergy:
    """Return an evaluator for an ``openmm.System``; raises ConfigurationError for anything else of OpenMM."""
    if not isinstance(target, openmm.System):
        raise ConfigurationError(f"cannot evaluate energies of an openmm.{type(target).__name__}: give the System")
    return OpenMMEnergy(target)
