"""Cut a batch into pieces of about equal time, for workers that take one after the other."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator

_FIRST = 4  # configurations, before the cost of one is known
_SHORTEST = 0.1  # of the length aimed at: the pieces get shorter towards the end, but each has a price


class Ranges:
    """Hands out ranges of indices: about as long as ``seconds`` of work, shorter towards the end, so that all end together."""

    def __init__(self, start: int, stop: int, workers: int, seconds: float, largest: int | None = None) -> None:
        self._left = collections.deque([(start, stop)] if stop > start else [])
        self._workers, self._seconds, self._largest = workers, seconds, largest
        self._lock = threading.Lock()
        self.cost: float | None = None

    def take(self) -> tuple[int, int] | None:
        """Return the next range, None when there is none."""
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
        """Take a range back that was not done."""
        if stop > start:
            with self._lock:
                self._left.append((start, stop))

    def rest(self) -> Iterator[tuple[int, int]]:
        """Return all that is left, leaving nothing."""
        while self._left:
            yield self._left.popleft()
