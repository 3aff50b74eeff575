"""How to evaluate batches of a System on this machine: found by a short trial, remembered in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import openmm

from ....core.cache import Cache, cache_folder
from ....core.errors import ConfigurationError, WorkerError
from ....core.execution.machine import machine
from .frames import Frames
from .processes import ProcessTeam
from .teams import SingleTeam, Team, ThreadTeam

WorkerKind = Literal["threads", "processes"]

_KIND, _FILE = "plans", "plan.json"  # in the cache
_PLATFORMS = ("Reference", "CPU", "CUDA", "HIP", "OpenCL")
_SHARED = ("Reference", "CPU")  # a GPU is shared by its Contexts: more of them would only wait for each other
_SECONDS = 0.15  # that a plan is timed for
_ROUNDS = 3
_HOPELESS = 3.0  # times the fastest single Context: more workers would not make up for it
# Several workers are chosen where they are this much faster than one. Threads hand one interpreter back and forth: what they
# gain in a short trial, with all cores awake and nothing else to do, they often do not gain later.
_WORTH: dict[WorkerKind, float] = {"processes": 1.05, "threads": 1.25}


@dataclass(frozen=True)
class Plan:
    """How configurations are evaluated.

    Attributes:
        platform: name of the OpenMM platform.
        workers: number of Contexts.
        kind: where they are, when there are several.
    """

    platform: str
    workers: int = 1
    kind: WorkerKind = "threads"

    @property
    def apart(self) -> bool:
        """Whether this process is kept out of it, so that a crash does not reach it."""
        return self.workers == 1 and self.kind == "processes"

    def team(self, system: openmm.System) -> Team:
        """Return who carries it out."""
        if self.workers == 1 and not self.apart:
            return SingleTeam(system, self.platform)
        return (ThreadTeam if self.kind == "threads" else ProcessTeam)(system, self.platform, self.workers)


@dataclass(frozen=True)
class Choices:
    """What a plan may be: None where it is free."""

    platform: str | None = None
    workers: int | None = None
    kind: WorkerKind | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigurationError(f"workers must be at least 1, got {self.workers}")
        if self.kind not in (None, "threads", "processes"):
            raise ConfigurationError(f"kind must be 'threads', 'processes' or None, got {self.kind!r}")
        if self.kind == "processes" and not ProcessTeam.possible():
            raise ConfigurationError("worker processes need a POSIX system here: use kind='threads'")
        if self.platform is not None and self.platform not in _registered():
            raise ConfigurationError(
                f"there is no OpenMM platform {self.platform!r} here: there are {', '.join(_registered())}"
            )

    def platforms(self) -> list[str]:
        """Return the platforms to try."""
        return [name for name in _PLATFORMS if name in _registered()] if self.platform is None else [self.platform]

    def first(self) -> Plan:
        """Return a plan that works everywhere, for the time before anything was tried."""
        return Plan(self.platform or "Reference")

    def only(self) -> Plan | None:
        """Return the plan where these choices leave just one."""
        if self.platform is None or self.workers is None or (self.workers > 1 and self.kind is None):
            return None
        return Plan(self.platform, self.workers, self.kind or "threads")

    def shared(self, platform: str, system: openmm.System) -> list[Plan]:
        """Return the plans with several Contexts on a platform."""
        workers = (os.cpu_count() or 1) if self.workers is None else self.workers
        if workers == 1 or platform not in _SHARED:
            return []
        kinds: list[WorkerKind] = ["threads", "processes"] if self.kind is None else [self.kind]
        if not ProcessTeam.possible() or _serialised(system) is None:
            kinds = [kind for kind in kinds if kind == "threads"]
        return [Plan(platform, workers, kind) for kind in kinds]


def remembered(system: openmm.System, choices: Choices) -> Plan | None:
    """Return the plan that was found for this System on this machine, if it was."""
    description = _describe(system, choices)
    folder = None if description is None else Cache(cache_folder(_KIND)).find(description)
    return None if folder is None else Plan(**json.loads((folder / _FILE).read_text()))


def choose(system: openmm.System, choices: Choices, sample: Frames) -> Plan:
    """Time the possible plans with configurations of the System, and remember the fastest."""
    singles: dict[Plan, float] = {}
    for platform in choices.platforms():
        # A platform without its device, or without a kernel for one of the forces, is none of the possible ones.
        with contextlib.suppress(openmm.OpenMMException):
            plan = Plan(platform)
            singles[plan] = _seconds(plan.team(system), sample, min(singles.values(), default=np.inf))
    if not singles:
        raise ConfigurationError(f"OpenMM cannot evaluate this System on any of {', '.join(choices.platforms())}")
    fastest = min(singles.values())
    times: dict[Plan, float] = {}
    for single, seconds in singles.items():
        for plan in choices.shared(single.platform, system) if seconds < _HOPELESS * fastest else []:
            team = plan.team(system)
            try:
                times[plan] = _WORTH[plan.kind] * _seconds(team, sample, fastest)
            except WorkerError as error:
                warnings.warn(f"batches of this System are evaluated without worker processes: {error}", stacklevel=5)
            finally:
                team.close()
    if choices.workers is None or not times:
        times.update(singles)
    best = min(times, key=lambda plan: times[plan])
    description = _describe(system, choices)
    if description is not None:
        # Where nothing can be kept, plans are timed once a process.
        with contextlib.suppress(OSError), Cache(cache_folder(_KIND)).making(description) as folder:
            (folder / _FILE).write_text(json.dumps(asdict(best)))
    return best


def _seconds(team: Team, sample: Frames, fastest: float) -> float:
    """Return the seconds of a configuration; after one that is hopelessly slow nothing more is tried."""

    def timed(count: int) -> float:
        chosen = np.arange(count) % len(sample)
        frames = Frames.waiting(sample.positions[chosen], None if sample.cells is None else sample.cells[chosen])
        begin = time.perf_counter()
        for _ in team.run(frames):
            pass
        return (time.perf_counter() - begin) / count

    timed(1)  # the first call sets things up
    once = timed(1)
    if once > 2 * _HOPELESS * fastest and once > _SECONDS:
        return once
    count = max(1, min(int(_SECONDS / once), 100))
    rough = timed(count)
    count = max(1, int(_SECONDS / rough))
    return min(timed(count) for _ in range(_ROUNDS))


def _registered() -> list[str]:
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def _serialised(system: openmm.System) -> str | None:
    try:
        xml: str = openmm.XmlSerializer.serialize(system)
    except Exception:  # a force written in Python that cannot be pickled
        return None
    return xml


def _describe(system: openmm.System, choices: Choices) -> dict[str, Any] | None:
    """Return what the best plan depends on; None for a System that cannot be serialised, whose plan is not kept."""
    xml = _serialised(system)
    if xml is None:
        return None
    return {
        "system": hashlib.sha256(xml.encode()).hexdigest(),
        "choices": asdict(choices),
        "platforms": choices.platforms(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "openmm": openmm.version.version,
    }
