"""Energies and forces of many configurations of one System, computed by the workers of an executor."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import openmm

from ....core.errors import ConfigurationError
from ....core.execution.executors import Executor
from .batch import ConfigurationBatch, FloatArray
from .batched import OpenMMEnergy, SystemEnergy
from .plans import PlanConstraints, fastest_plan

_JOBS_PER_WORKER = 4  # so that fast workers take over from slow ones
_SMALLEST, _LARGEST = 64, 4096  # configurations of a job: worth sending, and not too much to lose
_SAMPLE = 50  # configurations that platforms are timed with


@dataclass(frozen=True)
class _Job:
    """Configurations for a worker; ``start`` is the index of the first in the batch."""

    start: int
    system_xml: str
    platform: str
    positions: FloatArray
    cells: FloatArray | None
    forces: bool


@lru_cache(maxsize=4)
def _evaluator(system_xml: str, platform: str) -> OpenMMEnergy:
    """Return this worker's evaluator of a System; in a process of its own, so that a crash costs one configuration."""
    return OpenMMEnergy(openmm.XmlSerializer.deserialize(system_xml), platform, workers=1, kind="processes")


def _evaluate(job: _Job) -> tuple[int, FloatArray, FloatArray | None, dict[int, str]]:
    done = _evaluator(job.system_xml, job.platform).evaluated(job.positions, job.cells, forces=job.forces)
    return job.start, done.energies, done.forces, done.failures


class DistributedEnergy(SystemEnergy):
    """Batched energies of an OpenMM System on other machines; the interface of :class:`OpenMMEnergy`.

    All workers use one platform, so the numbers are those of ``OpenMMEnergy(system, platform)`` for any number of workers. The
    configurations of a worker that dies are evaluated again by another.

    Args:
        system: the System, without forces written in Python that cannot be serialised; later changes are not seen.
        executor: executor of the jobs, for instance a :class:`~flowbridge.integrations.dask.DaskExecutor`.
        platform: name of an OpenMM platform that all workers have; the one that is fastest here where None.
    """

    def __init__(self, system: openmm.System, executor: Executor, platform: str | None = None) -> None:
        super().__init__(system)
        self._constraints = PlanConstraints(platform, 1)
        self._system_xml: str = openmm.XmlSerializer.serialize(system)
        self._executor = executor
        self.platform = platform

    def _work(self, batch: ConfigurationBatch) -> Generator[tuple[int, int], None, None]:
        # A generator in fact, whose closing cancels what is not done.
        with closing(self._executor(_evaluate, self._jobs(batch))) as results:  # type: ignore[type-var]
            for start, energies, forces, failures in results:
                batch.take(start, energies, forces)
                batch.failures.update({start + index: reason for index, reason in failures.items()})
                yield start, start + len(energies)

    def _jobs(self, batch: ConfigurationBatch) -> list[_Job]:
        if not len(batch):
            return []
        if self.platform is None:
            self.platform = self._fastest_platform(batch)
        size = min(max(_SMALLEST, -(-len(batch) // (_JOBS_PER_WORKER * self._executor.workers))), _LARGEST)
        parts = [(start, batch.part(start, start + size)) for start in range(0, len(batch), size)]
        forces = batch.forces is not None
        return [
            _Job(start, self._system_xml, self.platform, part.positions, part.cells, forces) for start, part in parts
        ]

    def _fastest_platform(self, batch: ConfigurationBatch) -> str:
        sample = batch.usable_sample(_SAMPLE)
        if not len(sample):
            raise ConfigurationError(
                "no configuration of the first batch has finite positions to try OpenMM's platforms with: name one by platform="
            )
        return fastest_plan(self._system, self._constraints, sample).platform
