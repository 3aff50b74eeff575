"""Where commands on molecules compute: here, in processes, or on the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...core.execution.executors import Executor, ProcessExecutor


@contextmanager
def executor_for(workers: int, scheduler: str | None) -> Iterator[Executor | None]:
    """Give a place for independent jobs; None for one after the other in this process.

    Args:
        workers: processes at the same time.
        scheduler: of a Dask cluster instead; see :func:`flowbridge.integrations.dask.connected`.

    Raises:
        ConfigurationError, WorkerError, MissingDependencyError: when the cluster cannot be used.
    """
    if scheduler is not None:
        from ...integrations.dask import connected

        with connected(scheduler, workers) as executor:
            yield executor
    else:
        yield ProcessExecutor(workers) if workers > 1 else None
