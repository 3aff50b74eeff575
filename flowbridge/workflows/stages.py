"""Stages of a pipeline, and the folders of their results.

A stage's folder is named by the digest of its inputs: a changed setting gives another folder, and finished work is neither
repeated nor overwritten.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.training.processes import is_main_process

_POLL_SECONDS = 0.5  # between two checks for the results of another process
_LAYOUT = 2  # part of every digest: raise it when a stage writes something else for the same inputs
_SHORT = 40  # characters of a value that a message shows


class Row(NamedTuple):
    """A line of the table at the end, and of the report: what, its value, a remark."""

    name: str
    value: str
    note: str = ""


class Written(NamedTuple):
    """A file or folder that a stage writes, what it is, and its name at the top of the run's folder, if it has another."""

    file: str
    what: str
    name: str = ""


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage for one set of inputs.

    Attributes:
        name: of the stage, such as ``simulate``.
        digest: of the inputs, hexadecimal.
        folder: where its files are.
    """

    name: str
    digest: str
    folder: Path

    @classmethod
    def open(cls, output: Path, name: str, inputs: Mapping[str, Any], former_name: str = "") -> StageFolder:
        """Return the folder for ``inputs`` (plain data), and make it.

        Args:
            output: folder of the run.
            name: of the stage.
            inputs: what the results depend on; settings of the stage are under its name.
            former_name: name of the stage in former versions; a folder that one of them finished is used as it is.
        """
        if former_name:
            before = {former_name if key == name else key: value for key, value in inputs.items()}
            former = cls._of(output, former_name, _payload(former_name, before))
            if former.results is not None:
                return former
        payload = _payload(name, inputs)
        found = cls._of(output, name, payload)
        found.folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():  # two processes that write one file at the same time would spoil it
            write_json(found.folder / "inputs.json", json.loads(payload))
        return found

    @classmethod
    def _of(cls, output: Path, name: str, payload: str) -> StageFolder:
        digest = hashlib.sha256(payload.encode()).hexdigest()
        return cls(name, digest, output / "stages" / f"{name}-{digest[:12]}")

    @classmethod
    def completed(
        cls,
        output: Path,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[Path], Mapping[str, Any]],
        *,
        together: bool = False,
        former_name: str = "",
    ) -> StageFolder:
        """Return the folder for ``inputs`` with the work done: now, or when it was first asked for.

        Args:
            output: folder of the run.
            name: of the stage.
            inputs: plain data that the results depend on.
            work: does the work in the stage's folder, where it finds what an interrupted try left, and returns results.
            together: whether all processes of a training do the work at the same time.
            former_name: see :meth:`open`.
        """
        stage = cls.open(output, name, inputs, former_name)
        if stage.results is None and is_main_process():
            with stage.timed():
                results = work(stage.folder)
            stage.finish(results)
        elif stage.results is None and together:
            work(stage.folder)
        while stage.results is None:  # the main process is at work, and ends all processes if it fails
            time.sleep(_POLL_SECONDS)
        return stage

    @property
    def results(self) -> dict[str, Any] | None:
        """What the stage returned when it was done; None before."""
        return read_json(self.folder / "results.json")

    def finish(self, results: Mapping[str, Any]) -> None:
        """Mark the stage done with ``results`` and the seconds it took, interrupted tries included."""
        write_json(self.folder / "results.json", {**results, "wall_seconds": self.seconds})

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to the time of the stage, also when it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            write_json(self.folder / "seconds.json", {"seconds": self.seconds + time.monotonic() - start})

    @property
    def seconds(self) -> float:
        """Wall time of all tries so far."""
        return float((read_json(self.folder / "seconds.json") or {"seconds": 0.0})["seconds"])

    def changes(self) -> list[str]:
        """Return what differs from the inputs of the stage's last finished folder in this run; nothing without one."""
        others = [
            file.parent
            for file in self.folder.parent.glob(f"{self.name}-*/results.json")
            if file.parent != self.folder and file.parent.name.rpartition("-")[0] == self.name
        ]
        if not others:
            return []
        last = max(others, key=lambda folder: (folder / "results.json").stat().st_mtime)
        before, now = (dict(flattened(read_json(folder / "inputs.json") or {})) for folder in (last, self.folder))
        return [
            f"{key.removeprefix('inputs.')}: {_short(before.get(key))} -> {_short(now.get(key))}"
            for key in sorted(before | now)
            if before.get(key) != now.get(key)
        ]


Done = Mapping[str, StageFolder]
"""Finished stages by name."""


def numbers(results: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the single numbers of results."""
    for key, value in results.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Row(key, f"{value:.5g}" if isinstance(value, float) else str(value))


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, declared: the runner does it, or finds it done.

    Attributes:
        name: such as ``simulate``; the name of its folder begins with it.
        title: what it does, in a few words.
        work: does the work in the stage's folder, where it finds what an interrupted try left, with the finished stages;
            returns results that JSON can hold.
        inputs: what the results depend on besides the stages that it needs: plain data.
        needs: names of stages that have to be done before; their digests are inputs, too.
        writes: files that users take away, copied to the top of the run's folder.
        summary: what of the results the table at the end and the report show; all single numbers by default.
        under: key of ``results.json`` under which the results stand; at the top where empty.
        unlisted: keys of the results that stay out of the run's ``results.json``: curves and other long lists.
        together: whether all processes that ``torchrun`` started do the work at the same time.
        takes_place_of: name of a stage that this one replaces: later stages need it by that name.
        former_name: name of the stage in former versions, whose folders are recognised.
        output: folder where the stage is kept, if it is not the folder of the run: runs may share a stage.
    """

    name: str
    title: str
    work: Callable[[Path, Done], Mapping[str, Any]]
    inputs: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    writes: tuple[Written, ...] = ()
    summary: Callable[[Mapping[str, Any]], Iterable[Row]] = numbers
    under: str = ""
    unlisted: tuple[str, ...] = ()
    together: bool = False
    takes_place_of: str = ""
    former_name: str = ""
    output: Path | None = None

    @property
    def role(self) -> str:
        """The name by which other stages need this one."""
        return self.takes_place_of or self.name

    def all_inputs(self, done: Done) -> dict[str, Any]:
        """Return the inputs with the digests of the stages that this one needs."""
        return {**{name: done[name].digest for name in self.needs}, **self.inputs}

    def completed(self, output: Path, done: Done) -> StageFolder:
        """Do the work for the run in ``output``, or find it done."""
        return StageFolder.completed(
            self.output or output, self.name, self.all_inputs(done), lambda folder: self.work(folder, done),
            together=self.together, former_name=self.former_name,
        )  # fmt: skip


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(file, json.dumps(data, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    part = file.with_suffix(file.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds; None where there is no file."""
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _payload(name: str, inputs: Mapping[str, Any]) -> str:
    return json.dumps({"stage": name, "layout": _LAYOUT, "inputs": inputs}, sort_keys=True)


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``outer.inner`` and the value of nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
