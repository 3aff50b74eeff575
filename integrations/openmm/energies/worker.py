"""A process that evaluates configurations for another: ``python -m flowbridge.integrations.openmm.energies.worker``.

It shares memory with the process that started it, reads orders as lines from standard input and answers with lines on what
was standard output; it ends when its input does.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from typing import TextIO

import numpy as np
import openmm

from .frames import FloatArray, Frames, evaluate_frames, make_context

SLOTS = 2
"""Chunks in memory at once: one in work, one waiting, so that no worker waits for the next order."""

SLOT_SIZE = 512
"""Configurations that a chunk can hold."""


class SharedSlots:
    """Memory that two processes see: for each slot the inputs and results of a chunk, and the index of the frame in work.

    Args:
        descriptor: of a file that both have open, of at least :meth:`size` bytes.
        particles: of a configuration.
    """

    def __init__(self, descriptor: int, particles: int) -> None:
        memory = np.frombuffer(mmap.mmap(descriptor, self.size(particles)), dtype=np.float64)
        self.current: FloatArray = memory[:1]
        shapes = [(SLOT_SIZE, particles, 3), (SLOT_SIZE, 3, 3), (SLOT_SIZE,), (SLOT_SIZE, particles, 3)]
        self._arrays: list[list[FloatArray]] = []
        start = 1
        for _ in range(SLOTS):
            arrays = []
            for shape in shapes:
                length = int(np.prod(shape))
                arrays.append(memory[start : start + length].reshape(shape))
                start += length
            self._arrays.append(arrays)

    @staticmethod
    def size(particles: int) -> int:
        """Return the bytes needed."""
        return 8 * (1 + SLOTS * SLOT_SIZE * (3 * particles + 9 + 1 + 3 * particles))

    def frames(self, slot: int, count: int, *, with_cells: bool, with_forces: bool) -> Frames:
        """Return a view of the first ``count`` configurations of a slot."""
        positions, cells, energies, forces = (array[:count] for array in self._arrays[slot])
        return Frames(positions, cells if with_cells else None, energies, forces if with_forces else None)


def serve(orders: TextIO, answers: TextIO) -> None:
    """Make a Context as the first line says, then evaluate slots until there are no more orders."""
    job = json.loads(orders.readline())
    memory = SharedSlots(job["descriptor"], job["particles"])
    try:
        context = make_context(openmm.XmlSerializer.deserialize(job["system"]), job["platform"])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    memory.current[0] = -1
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in orders:
        slot, count, with_cells, with_forces = map(int, line.split())
        frames = memory.frames(slot, count, with_cells=bool(with_cells), with_forces=bool(with_forces))
        begin = time.perf_counter()
        evaluate_frames(context, frames, memory.current)
        memory.current[0] = -1
        answer = {"slot": slot, "seconds": time.perf_counter() - begin, "failures": list(frames.failures.items())}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started this decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a force prints must not be taken for an answer
    serve(sys.stdin, answers)
