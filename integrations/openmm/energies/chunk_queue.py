"""A batch cut into chunks of about equal time, for workers that take one after the other."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator

_FIRST = 4  # configurations, before the cost of one is known
_SHORTEST = 0.1  # of the wanted length: chunks get shorter towards the end, but each has a price


class ChunkQueue:
    """Ranges of indices of about ``seconds`` of work each, shorter towards the end, so that all workers end together.

    Args:
        start: first index.
        stop: index after the last one.
        workers: number of workers that take chunks.
        seconds: wanted time of a chunk.
        largest: largest number of configurations in a chunk; None for no limit.
    """

    def __init__(self, start: int, stop: int, workers: int, seconds: float, largest: int | None = None) -> None:
        self._left = collections.deque([(start, stop)] if stop > start else [])
        self._workers, self._seconds, self._largest = workers, seconds, largest
        self._lock = threading.Lock()
        self.cost: float | None = None

    def take(self) -> tuple[int, int] | None:
        """Return the next chunk, or None when there is none."""
        with self._lock:
            if not self._left:
                return None
            start, stop = self._left.popleft()
            length = _FIRST if self.cost is None else int(self._seconds / max(self.cost, 1e-9))
            if self._workers > 1:
                left = stop - start + sum(b - a for a, b in self._left)
                length = min(length, max(left // (2 * self._workers), int(_SHORTEST * length)))
            length = max(1, length if self._largest is None else min(length, self._largest))
            end = min(stop, start + length)
            if end < stop:
                self._left.appendleft((end, stop))
            return start, end

    def give_back(self, start: int, stop: int) -> None:
        """Return a chunk that was not evaluated to the queue."""
        if stop > start:
            with self._lock:
                self._left.append((start, stop))

    def rest(self) -> Iterator[tuple[int, int]]:
        """Remove and yield all that is left."""
        while self._left:
            yield self._left.popleft()
