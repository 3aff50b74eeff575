"""Contexts in worker processes, with configurations and results in shared memory."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator
from typing import IO, Any, NamedTuple, cast

import numpy as np
import openmm

from ....core.errors import WorkerError
from .batch import ConfigurationBatch
from .chunk_queue import ChunkQueue
from .worker import BUFFER_SIZE, BUFFERS, SharedBuffers

_SECONDS = 0.1  # longest chunk: frames of a trajectory are faster one after the other, since neighbour lists are reused
_MOST_DEATHS = 8  # of worker processes in a call, before the rest is given up


class ProcessPool:
    """One Context per process, with chunks in shared memory.

    A process that dies is replaced. Its current configuration is tried once more, since the process may have been killed from
    outside; when the second process dies too, that configuration has no energy, and all others have theirs.
    """

    def __init__(self, system: openmm.System, platform: str, workers: int) -> None:
        self._job = {"system": openmm.XmlSerializer.serialize(system), "platform": platform}
        self._particles, self._workers = system.getNumParticles(), workers
        self._processes: list[_Process] = []
        self._cost: float | None = None
        self._failed_starts = 0

    @staticmethod
    def possible() -> bool:
        """Return whether processes can share open files with their child processes."""
        return os.name == "posix"

    def evaluate(self, batch: ConfigurationBatch, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`ContextPool.evaluate`.

        Raises:
            WorkerError: when a process cannot be started, or cannot make a Context of the System.
        """
        pending = ChunkQueue(start, len(batch), self._workers, _SECONDS, BUFFER_SIZE)
        pending.cost = self._cost
        if not self._processes:
            self._processes = [_Process(self._job, self._particles) for _ in range(self._workers)]
        suspects: set[int] = set()
        deaths = self._failed_starts = 0
        complete = False
        try:
            with selectors.DefaultSelector() as selector:
                for process in self._processes:
                    selector.register(process.answers, selectors.EVENT_READ, process)
                    process.occupy(batch, pending)
                while any(process.chunks for process in self._processes):
                    for key, _ in selector.select():
                        process = key.data
                        if process.collect(batch, pending):
                            process.occupy(batch, pending)
                        else:
                            selector.unregister(process.answers)
                            deaths += 1
                            self._handle_death(process, batch, pending, suspects)
                            if deaths < _MOST_DEATHS:
                                new = self._replace()
                                selector.register(new.answers, selectors.EVENT_READ, new)
                            for colleague in self._processes:
                                colleague.occupy(batch, pending)
                        while process.finished:
                            yield process.finished.popleft()
                for first, last in pending.rest():  # no process is left to evaluate them
                    for index in range(first, last):
                        batch.fail(index, f"not evaluated: {deaths} worker processes had died before")
                    yield first, last
            complete = deaths < _MOST_DEATHS
            self._cost = pending.cost
        finally:
            if not complete:
                self.close()

    def _handle_death(
        self, process: _Process, batch: ConfigurationBatch, pending: ChunkQueue, suspects: set[int]
    ) -> None:
        """Return the chunks of a dead process to the queue; fail the configuration at which two processes died."""
        self._processes.remove(process)
        cause = process.cause_of_death()
        self._failed_starts += not process.ready
        if self._failed_starts > 1:  # a single one may have been killed from outside
            raise WorkerError(
                f"a worker process {cause} before it could start (its messages are on standard error); use "
                "kind='threads', which needs no other processes"
            )
        current = int(process.memory.current[0])
        if process.chunks and current >= 0:
            buffer, start, stop = process.chunks.popleft()
            culprit = start + current
            # Earlier results are in the memory, except for the reasons of failures.
            finite = process.copy_results(buffer, batch, start, culprit).finite
            process.finished.extend((start + int(index), start + int(index) + 1) for index in np.flatnonzero(finite))
            for index in np.flatnonzero(~finite):
                pending.give_back(start + int(index), start + int(index) + 1)
            pending.give_back(culprit + 1, stop)
            if culprit in suspects:
                batch.fail(culprit, f"the process that evaluated it {cause}, twice")
                process.finished.append((culprit, culprit + 1))
            else:
                suspects.add(culprit)
                pending.give_back(culprit, culprit + 1)
        for chunk in process.chunks:
            pending.give_back(chunk.start, chunk.stop)
        process.chunks.clear()

    def _replace(self) -> _Process:
        self._processes.append(_Process(self._job, self._particles))
        return self._processes[-1]

    def close(self) -> None:
        """See :meth:`ContextPool.close`."""
        for process in self._processes:
            process.end()
        self._processes = []


class _Chunk(NamedTuple):
    """A range of configurations in a buffer of a process."""

    buffer: int
    start: int
    stop: int


class _Process:
    """A worker process and the memory shared with it."""

    def __init__(self, job: dict[str, Any], particles: int) -> None:
        shared = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryFile(dir=shared) as file:
            file.truncate(SharedBuffers.size(particles))
            self.memory = SharedBuffers(file.fileno(), particles)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowbridge.integrations.openmm.energies.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()],
            )  # fmt: skip
            first = json.dumps({**job, "particles": particles, "descriptor": file.fileno()})
            self.memory.current[0] = -1
            self.chunks: collections.deque[_Chunk] = collections.deque()
            self.finished: collections.deque[tuple[int, int]] = collections.deque()
            self._free = list(range(BUFFERS))
            self._unread = b""
            self.ready = False
            self._finalizer = weakref.finalize(self, _end, self.process)
            self._order(first)

    @property
    def answers(self) -> int:
        """Descriptor of the pipe of answers."""
        return cast(IO[bytes], self.process.stdout).fileno()  # a pipe, as requested

    def _order(self, line: str) -> None:
        orders = cast(IO[bytes], self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the end of the process is noticed where its answers are read
            orders.write(f"{line}\n".encode())
            orders.flush()

    def occupy(self, batch: ConfigurationBatch, pending: ChunkQueue) -> None:
        """Fill the free buffers with chunks."""
        while self._free and (taken := pending.take()) is not None:
            start, stop = taken
            buffer = self._free.pop()
            cells, forces = batch.cells is not None, batch.forces is not None
            there = self.memory.batch(buffer, stop - start, cells, forces)
            there.positions[:] = batch.positions[start:stop]
            if there.cells is not None and batch.cells is not None:
                there.cells[:] = batch.cells[start:stop]
            self.chunks.append(_Chunk(buffer, start, stop))
            self._order(f"{buffer} {stop - start} {int(cells)} {int(forces)}")

    def collect(self, batch: ConfigurationBatch, pending: ChunkQueue) -> bool:
        """Copy the results that have arrived; return False when the process has ended.

        Raises WorkerError when the process cannot evaluate the System.
        """
        data = os.read(self.answers, 65536)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(
                    f"a worker process cannot evaluate this System: {answer['error']}; use kind='threads', which needs no "
                    "copy of the System in another process"
                )
            if "ready" in answer:
                self.ready = True
                continue
            buffer, start, stop = self.chunks.popleft()
            self.copy_results(buffer, batch, start, stop)
            batch.failures.update({start + index: reason for index, reason in answer["failures"]})
            self.finished.append((start, stop))
            pending.cost = answer["seconds"] / (stop - start)
            self._free.append(buffer)
        return bool(data)

    def copy_results(self, buffer: int, batch: ConfigurationBatch, start: int, stop: int) -> ConfigurationBatch:
        """Copy the results of a buffer to ``start`` to ``stop`` of the batch, and return the buffer."""
        there = self.memory.batch(buffer, stop - start, False, batch.forces is not None)
        batch.take(start, there.energies, there.forces)
        return there

    def cause_of_death(self) -> str:
        """Return a description of how the process ended."""
        status = self.process.wait()
        if status < 0:
            return f"was ended by signal {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def end(self) -> None:
        """Kill the process."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
