"""Contexts that share the work of a batch: one, or several in threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

import openmm

from .frames import Frames, evaluate_frames, make_context
from .ranges import Ranges

_SECONDS = 0.02  # length of a chunk: threads hand the interpreter over between chunks, which costs


class Team(Protocol):
    """Whatever can evaluate frames."""

    def run(self, frames: Frames, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """Evaluate the frames from ``start`` on; yield the ranges that are done, as they are.

        An iterator that is closed early leaves nothing behind that would write to the frames later.
        """
        ...

    def close(self) -> None:
        """Let go of processes; the next :meth:`run` starts new ones."""
        ...


class SingleTeam:
    """One Context in this thread."""

    def __init__(self, system: openmm.System, platform: str) -> None:
        self._context = make_context(system, platform)

    def run(self, frames: Frames, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`Team.run`; ranges come in order."""
        ranges = Ranges(start, len(frames), 1, _SECONDS)
        while (chunk := ranges.take()) is not None:
            ranges.cost = _evaluate(self._context, frames, *chunk)
            yield chunk

    def close(self) -> None:
        """See :meth:`Team.close`: there is nothing to let go of."""


class ThreadTeam:
    """A Context a thread: OpenMM lets go of the interpreter while it computes."""

    def __init__(self, system: openmm.System, platform: str, workers: int) -> None:
        self._contexts = [make_context(system, platform) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="flowbridge-energies")

    def run(self, frames: Frames, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`Team.run`."""
        ranges = Ranges(start, len(frames), len(self._contexts), _SECONDS)
        done: queue.SimpleQueue[tuple[int, int] | BaseException] = queue.SimpleQueue()
        over = threading.Event()

        def work(context: openmm.Context) -> None:
            try:
                while not over.is_set() and (chunk := ranges.take()) is not None:
                    ranges.cost = _evaluate(context, frames, *chunk)
                    done.put(chunk)
            except BaseException as error:  # raised where the work was asked for
                done.put(error)

        tasks = [self._pool.submit(work, context) for context in self._contexts]
        left = len(frames) - start
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
        """See :meth:`Team.close`: idle threads end with the interpreter."""


def _evaluate(context: openmm.Context, frames: Frames, start: int, stop: int) -> float:
    """Evaluate a range; return the seconds of one configuration."""
    begin = time.perf_counter()
    part = frames.part(start, stop)
    evaluate_frames(context, part)
    frames.failures.update({start + index: reason for index, reason in part.failures.items()})
    return (time.perf_counter() - begin) / (stop - start)
