"""Where the independent pieces of a workflow run: processes here, or the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.energy import BatchedEnergy
from ..core.execution.executors import Executor, ProcessExecutor
from ..core.training.processes import is_main_process, local_processes
from ..integrations.openmm.energies.batched import OpenMMEnergy
from ..integrations.openmm.energies.distributed import DistributedEnergy
from ..integrations.openmm.systems.input_files import MolecularSystem

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Machines:
    """What a workflow has to compute with; its numbers do not depend on it.

    Attributes:
        here: processes of this machine.
        cluster: workers elsewhere, for simulations, batched energies and samples; None where there are none.
    """

    here: ProcessExecutor
    cluster: Executor | None = None

    @property
    def executor(self) -> Executor:
        """Where independent jobs go."""
        return self.here if self.cluster is None else self.cluster

    def energy_here(self, molecule: MolecularSystem) -> OpenMMEnergy:
        """Return an evaluator of the molecule's energies on this machine.

        Its plan is settled: work that is resumed gives the same numbers.
        """
        energy = OpenMMEnergy(molecule.system, workers=self.here.workers)
        energy.settle(molecule.positions[None])
        return energy

    def energy(self, molecule: MolecularSystem) -> BatchedEnergy:
        """Return an evaluator of the molecule's energies for large batches."""
        if self.cluster is None:
            return self.energy_here(molecule)
        # The platform that is settled here, so that the cluster's numbers are the same as this machine's.
        plan = self.energy_here(molecule).plan
        return DistributedEnergy(molecule.system, self.cluster, None if plan is None else plan.platform)


@contextmanager
def machines_for(workers: int, scheduler: str | Client | None) -> Iterator[Machines]:
    """Give a workflow its machines, and let go of what was started for it.

    Args:
        workers: number of processes on this machine.
        scheduler: a Dask ``Client``, the address of a Dask scheduler (``tcp://host:8786``), the path of a scheduler file, or
            ``local`` for a cluster on this machine with as many workers; None for processes.
    """
    here = ProcessExecutor(max(1, workers // local_processes()))
    if scheduler is None or not is_main_process():
        yield Machines(here)
        return
    from ..integrations.dask import connected

    with connected(scheduler, workers) as cluster:
        yield Machines(here, cluster)


@contextmanager
def executor_for(workers: int, scheduler: str | Client | None) -> Iterator[Executor | None]:
    """Give a place for independent jobs: a cluster, processes, or None for one after the other in this process.

    Args:
        workers: number of processes at the same time.
        scheduler: as for :func:`machines_for`.

    Raises:
        ConfigurationError, WorkerError, MissingDependencyError: when the cluster cannot be used.
    """
    with machines_for(workers, scheduler) as machines:
        yield machines.executor if machines.cluster is not None or workers > 1 else None
