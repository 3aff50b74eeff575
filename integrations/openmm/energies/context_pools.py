"""Contexts that share the work of a batch: one, or several in threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

import openmm

from .batch import ConfigurationBatch, evaluate_batch, make_context
from .chunk_queue import ChunkQueue

_SECONDS = 0.02  # length of a chunk: threads exchange the interpreter lock between chunks, which costs time


class ContextPool(Protocol):
    """One or more Contexts that evaluate batches."""

    def evaluate(self, batch: ConfigurationBatch, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """Evaluate the configurations from ``start`` on; yield each range when it is done.

        After the iterator is closed, nothing writes to the batch any more.
        """
        ...

    def close(self) -> None:
        """End worker processes; the next :meth:`evaluate` starts new ones."""
        ...


class SingleContext:
    """One Context in this thread."""

    def __init__(self, system: openmm.System, platform: str) -> None:
        self._context = make_context(system, platform)

    def evaluate(self, batch: ConfigurationBatch, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`ContextPool.evaluate`; ranges come in order."""
        pending = ChunkQueue(start, len(batch), 1, _SECONDS)
        while (chunk := pending.take()) is not None:
            pending.cost = _evaluate(self._context, batch, *chunk)
            yield chunk

    def close(self) -> None:
        """See :meth:`ContextPool.close`: there are no processes."""


class ThreadPool:
    """One Context per thread: OpenMM releases the interpreter lock while it computes."""

    def __init__(self, system: openmm.System, platform: str, workers: int) -> None:
        self._contexts = [make_context(system, platform) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="flowbridge-energies")

    def evaluate(self, batch: ConfigurationBatch, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`ContextPool.evaluate`."""
        pending = ChunkQueue(start, len(batch), len(self._contexts), _SECONDS)
        done: queue.SimpleQueue[tuple[int, int] | BaseException] = queue.SimpleQueue()
        over = threading.Event()

        def work(context: openmm.Context) -> None:
            try:
                while not over.is_set() and (chunk := pending.take()) is not None:
                    pending.cost = _evaluate(context, batch, *chunk)
                    done.put(chunk)
            except BaseException as error:  # raised in the calling thread
                done.put(error)

        tasks = [self._pool.submit(work, context) for context in self._contexts]
        left = len(batch) - start
        try:
            while left:
                chunk = done.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                left -= chunk[1] - chunk[0]
                yield chunk
        finally:
            over.set()
            wait(tasks)

    def close(self) -> None:
        """See :meth:`ContextPool.close`: idle threads end with the interpreter."""


def _evaluate(context: openmm.Context, batch: ConfigurationBatch, start: int, stop: int) -> float:
    """Evaluate a range; return the seconds of one configuration."""
    begin = time.perf_counter()
    part = batch.part(start, stop)
    evaluate_batch(context, part)
    batch.failures.update({start + index: reason for index, reason in part.failures.items()})
    return (time.perf_counter() - begin) / (stop - start)
