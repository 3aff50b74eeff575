"""Stages of a workflow: each has a folder named by the digest of its inputs, and is done once.

A changed setting gives another digest, hence another folder: finished work is neither repeated nor overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.training.processes import is_main_process

_GLANCE = 0.5  # seconds between two looks for what another process does
_LAYOUT = 2  # part of every digest: raise it when a stage writes something else for the same inputs


@dataclass(frozen=True)
class Stage:
    """One stage with its inputs' digest.

    Attributes:
        name: such as ``simulate``.
        digest: of the inputs, hexadecimal.
        folder: where its files live.
    """

    name: str
    digest: str
    folder: Path

    @classmethod
    def open(cls, output: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return the stage for ``inputs`` (plain data), and make its folder."""
        text = json.dumps({"stage": name, "layout": _LAYOUT, "inputs": inputs}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        folder = output / "stages" / f"{name}-{digest[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():  # two that write one file at the same time lose it to each other
            write_json(folder / "inputs.json", json.loads(text))
        return cls(name, digest, folder)

    @classmethod
    def completed(
        cls, output: Path, name: str, inputs: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]
    ) -> Stage:
        """Return the stage for ``inputs`` with its work done: now, or when it was first asked for.

        Args:
            output: folder of the workflow.
            name: of the stage.
            inputs: plain data that the results depend on.
            work: does the work in the stage's folder, where it finds what an interrupted try left, and returns results.
        """
        stage = cls.open(output, name, inputs)
        if stage.results is None and is_main_process():
            with stage.timed():
                results = work(stage.folder)
            stage.finish(results)
        return stage.awaited()

    @classmethod
    def completed_together(
        cls, output: Path, name: str, inputs: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]
    ) -> Stage:
        """As :meth:`completed`, for work that all processes of a training do at the same time (see :mod:`.ranks`)."""
        if is_main_process():
            return cls.completed(output, name, inputs, work)
        stage = cls.open(output, name, inputs)
        if stage.results is None:
            work(stage.folder)
        return stage.awaited()

    def awaited(self) -> Stage:
        """Return the stage when its results are there: the leading process has it in work, and ends all where it fails."""
        while self.results is None:
            time.sleep(_GLANCE)
        return self

    @property
    def results(self) -> dict[str, Any] | None:
        """What the stage returned when it was done; None before."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        loaded: dict[str, Any] = json.loads(file.read_text())
        return loaded

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Mark the stage done with ``results`` and the seconds it took, interrupted tries included; return both."""
        complete = {**results, "wall_seconds": self._seconds()}
        write_json(self.folder / "results.json", complete)
        return complete

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to the stage's account, also when it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            write_json(self.folder / "seconds.json", {"seconds": self._seconds() + time.monotonic() - start})

    def _seconds(self) -> float:
        file = self.folder / "seconds.json"
        return float(json.loads(file.read_text())["seconds"]) if file.is_file() else 0.0


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, file)
