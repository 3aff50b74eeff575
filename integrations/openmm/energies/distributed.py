"""Energies and forces of many configurations of one System, spread over processes or machines."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import openmm

from ....core.errors import ConfigurationError
from ....core.execution.executors import Executor
from .batched import OpenMMEnergy, SystemEnergy
from .frames import FloatArray, Frames
from .plans import Choices, choose

_PIECES = 4  # for each job that runs at the same time: what one is slower at, others take over
_SMALLEST, _LARGEST = 64, 4096  # configurations of a job: worth the journey, and not too much to lose
_SAMPLE = 50  # configurations that platforms are tried with


@dataclass(frozen=True)
class _Piece:
    """Configurations on their way to a worker."""

    start: int
    system_xml: str
    platform: str
    positions: FloatArray
    cells: FloatArray | None
    forces: bool


@dataclass(frozen=True)
class _Evaluated:
    """What a worker sends back."""

    start: int
    energies: FloatArray
    forces: FloatArray | None
    failures: dict[int, str]


@lru_cache(maxsize=4)
def _evaluator(system_xml: str, platform: str) -> OpenMMEnergy:
    """Return this process's evaluator of a System; in a process of its own, so that a crash costs one configuration."""
    return OpenMMEnergy(openmm.XmlSerializer.deserialize(system_xml), platform, workers=1, kind="processes")


def _evaluate(piece: _Piece) -> _Evaluated:
    frames = _evaluator(piece.system_xml, piece.platform).filled(piece.positions, piece.cells, forces=piece.forces)
    return _Evaluated(piece.start, frames.energies, frames.forces, frames.failures)


class DistributedEnergy(SystemEnergy):
    """Batched energies of an OpenMM System on other machines; the methods of :class:`OpenMMEnergy`.

    All workers use one platform, so the numbers are those of ``OpenMMEnergy(system, platform)``, however many there are. A
    worker that dies loses nothing: its configurations are evaluated again by another. Workers that cannot do it at all raise a
    WorkerError.

    Args:
        system: the System, without forces written in Python that cannot be serialised; later changes are not seen.
        executor: where to evaluate, for instance a :class:`~flowbridge.integrations.dask.DaskExecutor`.
        platform: name of the OpenMM platform, which the workers have to have; the one that is fastest here where None.
    """

    def __init__(self, system: openmm.System, executor: Executor, platform: str | None = None) -> None:
        super().__init__(system)
        self._choices = Choices(platform, 1)
        self._system_xml: str = openmm.XmlSerializer.serialize(system)
        self._executor = executor
        self.platform = platform

    def _work(self, frames: Frames) -> Generator[tuple[int, int], None, None]:
        # A generator in fact, whose closing calls off what is not done.
        with closing(self._executor(_evaluate, self._pieces(frames))) as results:  # type: ignore[type-var]
            for piece in results:
                frames.take(piece.start, piece.energies, piece.forces)
                frames.failures.update({piece.start + index: reason for index, reason in piece.failures.items()})
                yield piece.start, piece.start + len(piece.energies)

    def _pieces(self, frames: Frames) -> list[_Piece]:
        if not len(frames):
            return []
        if self.platform is None:
            self.platform = self._fastest_platform(frames)
        slots = self._executor.workers
        size = min(max(_SMALLEST, -(-len(frames) // (_PIECES * slots))), _LARGEST)
        return [
            _Piece(
                start,
                self._system_xml,
                self.platform,
                frames.positions[start : start + size],
                None if frames.cells is None else frames.cells[start : start + size],
                frames.forces is not None,
            )
            for start in range(0, len(frames), size)
        ]

    def _fastest_platform(self, frames: Frames) -> str:
        usable = np.flatnonzero(np.isfinite(frames.positions).all((1, 2)))[:_SAMPLE]
        if not len(usable):
            raise ConfigurationError(
                "no configuration of the first batch has finite positions to try OpenMM's platforms with: name one by platform="
            )
        cells = None if frames.cells is None else frames.cells[usable]
        return choose(self._system, self._choices, Frames.waiting(frames.positions[usable], cells)).platform
