"""Worker process that evaluates configurations: ``python -m flowbridge.integrations.openmm.energies.worker``.

It shares memory with the process that started it, reads one order per line from standard input, writes one answer per line to
the original standard output, and ends when its input does.
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

from .batch import ConfigurationBatch, FloatArray, evaluate_batch, make_context

BUFFERS = 2
"""Number of chunks in memory at once: one in progress, one waiting, so that no worker waits for the next order."""

BUFFER_SIZE = 512
"""Largest number of configurations in a chunk."""


class SharedBuffers:
    """Memory that two processes share: buffers with inputs and results of chunks, and the index of the current configuration.

    Args:
        descriptor: descriptor of a file that both have open, of at least :meth:`size` bytes.
        particles: number of particles of a configuration.
    """

    def __init__(self, descriptor: int, particles: int) -> None:
        memory = np.frombuffer(mmap.mmap(descriptor, self.size(particles)), dtype=np.float64)
        self.current: FloatArray = memory[:1]
        shapes = [(BUFFER_SIZE, particles, 3), (BUFFER_SIZE, 3, 3), (BUFFER_SIZE,), (BUFFER_SIZE, particles, 3)]
        self._arrays: list[list[FloatArray]] = []
        start = 1
        for _ in range(BUFFERS):
            arrays = []
            for shape in shapes:
                length = int(np.prod(shape))
                arrays.append(memory[start : start + length].reshape(shape))
                start += length
            self._arrays.append(arrays)

    @staticmethod
    def size(particles: int) -> int:
        """Return the number of bytes needed."""
        return 8 * (1 + BUFFERS * BUFFER_SIZE * (3 * particles + 9 + 1 + 3 * particles))

    def batch(self, buffer: int, count: int, with_cells: bool, with_forces: bool) -> ConfigurationBatch:
        """Return a view of the first ``count`` configurations of a buffer."""
        positions, cells, energies, forces = (array[:count] for array in self._arrays[buffer])
        return ConfigurationBatch(positions, cells if with_cells else None, energies, forces if with_forces else None)


def serve(orders: TextIO, answers: TextIO) -> None:
    """Make a Context as the first line says, then evaluate buffers until there are no more orders."""
    job = json.loads(orders.readline())
    memory = SharedBuffers(job["descriptor"], job["particles"])
    try:
        context = make_context(openmm.XmlSerializer.deserialize(job["system"]), job["platform"])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    memory.current[0] = -1
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in orders:
        buffer, count, with_cells, with_forces = map(int, line.split())
        batch = memory.batch(buffer, count, bool(with_cells), bool(with_forces))
        begin = time.perf_counter()
        evaluate_batch(context, batch, memory.current)
        memory.current[0] = -1
        answer = {"seconds": time.perf_counter() - begin, "failures": list(batch.failures.items())}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent process decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of a force must not be taken for an answer
    serve(sys.stdin, answers)
