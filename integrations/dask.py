"""Dask: simulations, batched energies and samples on the workers of a cluster.

Import it as ``flowbridge.integrations.dask``; inside, ``import distributed`` is the package itself.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from ..core.errors import ConfigurationError, MissingDependencyError, WorkerError

try:
    import distributed
    from distributed.scheduler import KilledWorker
except ImportError as error:
    raise MissingDependencyError(
        "clusters of machines need Dask: pip install 'flowbridge[many-machines]', here and on the workers"
    ) from error

Job = TypeVar("Job")
Result = TypeVar("Result")

_PACKAGES = ("flowbridge", "openmm", "torch", "numpy")
_CONNECTING = 15.0  # seconds
_PATIENCE = 60.0  # seconds to wait for the first worker


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


class DaskExecutor:
    """A :class:`~flowbridge.core.execution.executors.Executor` over the workers of a Dask cluster.

    Another worker repeats the job of a worker that dies, from its seed, with the same result. No disk is shared: results return
    to the caller, who writes them.

    Args:
        client: client of a scheduler whose workers have one thread each (``dask worker --nthreads 1``), since OpenMM's
            Reference platform draws the random numbers of all simulations of a process from one stream.
        patience: seconds to wait for the first worker; a batch system may need long.

    Raises:
        WorkerError: when no worker joins, or one lacks flowbridge.
        ConfigurationError: for workers with several threads or other versions of flowbridge, OpenMM, torch or numpy.
    """

    def __init__(self, client: distributed.Client, patience: float = _PATIENCE) -> None:
        self._client = client
        address = str(client.scheduler.address) if client.scheduler is not None else "no scheduler"
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as error:
            raise WorkerError(
                f"no worker has joined the scheduler at {address} within {patience:g} seconds: start some with "
                f"'dask worker {address} --nthreads 1', or check the batch system that starts them"
            ) from error
        self._refuse_threads(address)
        self._refuse_other_versions()

    @property
    def workers(self) -> int:
        """Number of jobs that run at the same time: the present number of workers."""
        return max(1, len(self._client.nthreads()))

    def __call__(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """See :class:`~flowbridge.core.execution.executors.Executor`.

        Raises:
            WorkerError: when several workers died of one job, or the scheduler is gone.
        """
        # Without a key, equal jobs of different calls are different tasks.
        futures = [self._client.submit(function, job, pure=False) for job in jobs]
        try:
            for future in distributed.as_completed(futures):
                yield _result(future)
        finally:
            self._client.cancel(futures, force=True)

    def _refuse_threads(self, address: str) -> None:
        several = {worker: count for worker, count in self._client.nthreads().items() if count != 1}
        if several:
            worker, count = next(iter(several.items()))
            raise ConfigurationError(
                f"{len(several)} workers of {address} run several jobs at once ({worker} has {count} threads): simulations in "
                "one process share a stream of random numbers and would not repeat. Start workers with --nthreads 1 "
                "(LocalCluster: threads_per_worker=1; dask-jobqueue: processes equal to cores)"
            )

    def _refuse_other_versions(self) -> None:
        found = self._client.run(_versions, on_error="return")
        here = _versions()
        for worker, there in found.items():
            if isinstance(there, BaseException):
                raise WorkerError(
                    f"the worker {worker} cannot use flowbridge ({type(there).__name__}: {there}): install there what is "
                    f"installed here, flowbridge {here['flowbridge']} with openmm {here['openmm']} and torch {here['torch']}"
                ) from there
            other = [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]
            if other:
                raise ConfigurationError(
                    f"the worker {worker} has {', '.join(other)}: numbers would depend on where they are computed. Install the "
                    "same versions on all machines"
                )


def _result(future: distributed.Future[Result]) -> Result:
    try:
        return future.result()
    except KilledWorker as error:
        raise WorkerError(
            f"a job has cost {error.allowed_failures + 1} workers their life, the last was {error.last_worker.address}: look "
            "into that worker's log; most often its memory was too small. What is finished is kept"
        ) from error
    except distributed.client.FutureCancelledError as error:
        raise WorkerError(
            "the connection to the scheduler is lost, and with it the running jobs: repeat the call"
        ) from error


@contextmanager
def connected(scheduler: str | distributed.Client, workers: int) -> Iterator[DaskExecutor]:
    """Connect to a cluster, and close at the end what was opened here.

    Args:
        scheduler: a client, which stays open; the address of a scheduler (``tcp://host:8786``); the path of a scheduler file
            (``dask scheduler --scheduler-file``); or ``local`` for a cluster of processes on this machine.
        workers: number of processes of a local cluster.

    Raises:
        ConfigurationError: for an address where no scheduler answers, or a missing file.
        WorkerError: see :class:`DaskExecutor`.
    """
    if isinstance(scheduler, distributed.Client):
        yield DaskExecutor(scheduler)
    elif scheduler == "local":
        with (
            distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield DaskExecutor(client)
    else:
        with _client(scheduler) as client:
            yield DaskExecutor(client)


def _client(scheduler: str) -> distributed.Client:
    if "://" not in scheduler and scheduler.endswith(".json"):
        if not Path(scheduler).is_file():
            raise ConfigurationError(
                f"there is no scheduler file {scheduler}: start 'dask scheduler --scheduler-file' first"
            )
        return distributed.Client(scheduler_file=scheduler)
    _refuse_unreachable(scheduler)
    return distributed.Client(scheduler)


def _refuse_unreachable(address: str) -> None:
    """Test the address before a client is created: a client that cannot connect hangs in garbage collection."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING).close()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no Dask scheduler answers at {address!r} ({error}): give an address such as tcp://host:8786, the path of a "
            "scheduler file ending in .json, or 'local'"
        ) from error
