"""Independent jobs over processes of this machine; other places to run them have the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs a function on every job, somewhere, and yields the results as they come.

    The function is at the top of a module and jobs are plain data: both travel to other processes. A result carries what tells
    which job it is of; the order is that of finishing. The first exception cancels what has not started, and is raised; so does
    closing the iterator.
    """

    @property
    def workers(self) -> int:
        """How many jobs run at the same time."""
        ...

    def __call__(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield ``function(job)`` of every job."""
        ...


@dataclass(frozen=True)
class ProcessExecutor:
    """A :class:`Executor` over fresh processes (spawned, so that no engine's state is shared).

    Attributes:
        workers: how many at the same time.
    """

    workers: int

    def __call__(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """See :class:`Executor`."""
        if not jobs:
            return
        with ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=get_context("spawn")) as executor:
            futures = [executor.submit(function, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                executor.shutdown(wait=True, cancel_futures=True)
