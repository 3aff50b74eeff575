"""Contexts in processes of their own, with configurations and results in shared memory."""

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
from .frames import Frames
from .ranges import Ranges
from .worker import SLOT_SIZE, SLOTS, SharedSlots

_SECONDS = 0.1  # longest chunk: frames of a trajectory are faster one after the other, for neighbour lists are kept
_MOST_DEATHS = 8  # of worker processes in a call, before what is left is given up


class ProcessTeam:
    """A Context a process, with chunks passed through shared memory.

    A process that dies is replaced. The configuration it was at is tried once more, for somebody else may have ended the
    process; when that one dies too, the configuration has no energy, and all others have theirs.
    """

    def __init__(self, system: openmm.System, platform: str, workers: int) -> None:
        self._job = {"system": openmm.XmlSerializer.serialize(system), "platform": platform}
        self._particles, self._workers = system.getNumParticles(), workers
        self._processes: list[_Process] = []
        self._cost: float | None = None
        self._stillborn = 0

    @staticmethod
    def possible() -> bool:
        """Return whether processes can share open files with those that they start."""
        return os.name == "posix"

    def run(self, frames: Frames, start: int = 0) -> Generator[tuple[int, int], None, None]:
        """See :meth:`Team.run`.

        Raises:
            WorkerError: when a process cannot be started, or cannot make a Context of the System.
        """
        ranges = Ranges(start, len(frames), self._workers, _SECONDS, SLOT_SIZE)
        ranges.cost = self._cost
        if not self._processes:
            self._processes = [_Process(self._job, self._particles) for _ in range(self._workers)]
        suspects: set[int] = set()
        deaths = self._stillborn = 0
        complete = False
        try:
            with selectors.DefaultSelector() as selector:
                for process in self._processes:
                    selector.register(process.answers, selectors.EVENT_READ, process)
                    process.occupy(frames, ranges)
                while any(process.chunks for process in self._processes):
                    for key, _ in selector.select():
                        process = key.data
                        if process.collect(frames, ranges):
                            process.occupy(frames, ranges)
                        else:
                            selector.unregister(process.answers)
                            deaths += 1
                            self._bury(process, frames, ranges, suspects)
                            if deaths < _MOST_DEATHS:
                                new = self._replace()
                                selector.register(new.answers, selectors.EVENT_READ, new)
                            for colleague in self._processes:
                                colleague.occupy(frames, ranges)
                        while process.finished:
                            yield process.finished.popleft()
                for first, last in ranges.rest():  # nobody is left to do them
                    for index in range(first, last):
                        frames.fail(index, f"not evaluated: {deaths} worker processes had died before")
                    yield first, last
            complete = deaths < _MOST_DEATHS
            self._cost = ranges.cost
        finally:
            if not complete:
                self.close()

    def _bury(self, process: _Process, frames: Frames, ranges: Ranges, suspects: set[int]) -> None:
        """Give back what a dead process was to do; blame the configuration that a process has died at before."""
        self._processes.remove(process)
        cause = process.cause_of_death()
        self._stillborn += not process.ready
        if self._stillborn > 1:  # a single one may have been ended by somebody else
            raise WorkerError(
                f"a worker process {cause} before it could start (its last words are on standard error); use "
                "kind='threads', which needs no other processes"
            )
        current = int(process.memory.current[0])
        if process.chunks and current >= 0:
            slot, start, stop = process.chunks.popleft()
            culprit = start + current
            # What it had done before is in the memory, except for the reasons of failures.
            for index in process.salvage(slot, frames, start, culprit):
                ranges.give_back(index, index + 1)
            if culprit in suspects:
                frames.fail(culprit, f"the process that evaluated it {cause}, twice")
                process.finished.append((culprit, culprit + 1))
            else:
                suspects.add(culprit)
                ranges.give_back(culprit, culprit + 1)
            ranges.give_back(culprit + 1, stop)
        for chunk in process.chunks:
            ranges.give_back(chunk.start, chunk.stop)
        process.chunks.clear()

    def _replace(self) -> _Process:
        self._processes.append(_Process(self._job, self._particles))
        return self._processes[-1]

    def close(self) -> None:
        """See :meth:`Team.close`."""
        for process in self._processes:
            process.end()
        self._processes = []


class _Chunk(NamedTuple):
    """A range of frames in a slot of a process."""

    slot: int
    start: int
    stop: int


class _Process:
    """One worker process and the memory shared with it."""

    def __init__(self, job: dict[str, Any], particles: int) -> None:
        shared = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryFile(dir=shared) as file:
            file.truncate(SharedSlots.size(particles))
            self.memory = SharedSlots(file.fileno(), particles)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowbridge.integrations.openmm.energies.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()],
            )  # fmt: skip
            first = json.dumps({**job, "particles": particles, "descriptor": file.fileno()})
            self.memory.current[0] = -1
            self.chunks: collections.deque[_Chunk] = collections.deque()
            self.finished: collections.deque[tuple[int, int]] = collections.deque()
            self._free = list(range(SLOTS))
            self._unread = b""
            self.ready = False
            self._finalizer = weakref.finalize(self, _end, self.process)
            self._order(first)

    @property
    def answers(self) -> int:
        """Descriptor of the pipe that answers come through."""
        return cast(IO[bytes], self.process.stdout).fileno()  # a pipe, as asked for

    def _order(self, line: str) -> None:
        orders = cast(IO[bytes], self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # its end is noticed where its answers are read
            orders.write(f"{line}\n".encode())
            orders.flush()

    def occupy(self, frames: Frames, ranges: Ranges) -> None:
        """Fill the free slots with work."""
        while self._free and (taken := ranges.take()) is not None:
            start, stop = taken
            slot = self._free.pop()
            cells, forces = frames.cells is not None, frames.forces is not None
            there = self.memory.frames(slot, stop - start, with_cells=cells, with_forces=forces)
            there.positions[:] = frames.positions[start:stop]
            if there.cells is not None and frames.cells is not None:
                there.cells[:] = frames.cells[start:stop]
            self.chunks.append(_Chunk(slot, start, stop))
            self._order(f"{slot} {stop - start} {int(cells)} {int(forces)}")

    def collect(self, frames: Frames, ranges: Ranges) -> bool:
        """Take the results of the answers that have come; False when the process has ended.

        Raises WorkerError when it cannot work.
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
            slot, start, stop = self.chunks.popleft()
            self._results(slot, frames, start, stop)
            frames.failures.update({start + index: reason for index, reason in answer["failures"]})
            self.finished.append((start, stop))
            ranges.cost = answer["seconds"] / (stop - start)
            self._free.append(slot)
        return bool(data)

    def _results(self, slot: int, frames: Frames, start: int, stop: int) -> Frames:
        """Copy what is in a slot to the frames ``start`` to ``stop``, and return it."""
        there = self.memory.frames(slot, stop - start, with_cells=False, with_forces=frames.forces is not None)
        frames.take(start, there.energies, there.forces)
        return there

    def salvage(self, slot: int, frames: Frames, start: int, stop: int) -> list[int]:
        """Take the results that a dead process left for the frames ``start`` to ``stop``; return which it did not leave."""
        usable = self._results(slot, frames, start, stop).finite
        self.finished.extend((start + int(index), start + int(index) + 1) for index in np.flatnonzero(usable))
        return [start + int(index) for index in np.flatnonzero(~usable)]

    def cause_of_death(self) -> str:
        """Return how the process ended."""
        status = self.process.wait()
        if status < 0:
            return f"was ended by signal {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def end(self) -> None:
        """End it, whatever it is at."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
