"""The fastest way to evaluate batches of a System on this machine: timed once, stored in the user's cache folder."""

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
from .batch import ConfigurationBatch
from .context_pools import ContextPool, SingleContext, ThreadPool
from .process_pool import ProcessPool

WorkerKind = Literal["threads", "processes"]

_KIND, _FILE = "plans", "plan.json"  # in the cache
_PLATFORMS = ("Reference", "CPU", "CUDA", "HIP", "OpenCL")
_SHARED = ("Reference", "CPU")  # a GPU is shared by its Contexts: more of them would only wait for each other
_SECONDS = 0.15  # that a plan is timed for
_ROUNDS = 3
_HOPELESS = 3.0  # times the fastest single Context: more workers do not make up for it
# Several workers are chosen where they are this much faster than one. Threads share one interpreter lock: their gain in a short
# trial, with all cores awake and nothing else to do, is often lost later.
_WORTH: dict[WorkerKind, float] = {"processes": 1.05, "threads": 1.25}


@dataclass(frozen=True)
class EvaluationPlan:
    """A way to evaluate configurations.

    Attributes:
        platform: name of the OpenMM platform.
        workers: number of Contexts.
        kind: kind of workers, where there are several.
    """

    platform: str
    workers: int = 1
    kind: WorkerKind = "threads"

    @property
    def isolated(self) -> bool:
        """Whether another process does all the work, so that a crash does not reach this one."""
        return self.workers == 1 and self.kind == "processes"

    def pool(self, system: openmm.System) -> ContextPool:
        """Return the Contexts of the plan."""
        if self.workers == 1 and not self.isolated:
            return SingleContext(system, self.platform)
        return (ThreadPool if self.kind == "threads" else ProcessPool)(system, self.platform, self.workers)


@dataclass(frozen=True)
class PlanConstraints:
    """Constraints of the user on a plan; None where it is free."""

    platform: str | None = None
    workers: int | None = None
    kind: WorkerKind | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigurationError(f"workers must be at least 1, got {self.workers}")
        if self.kind not in (None, "threads", "processes"):
            raise ConfigurationError(f"kind must be 'threads', 'processes' or None, got {self.kind!r}")
        if self.kind == "processes" and not ProcessPool.possible():
            raise ConfigurationError("worker processes need a POSIX system here: use kind='threads'")
        if self.platform is not None and self.platform not in _registered():
            raise ConfigurationError(
                f"there is no OpenMM platform {self.platform!r} here: there are {', '.join(_registered())}"
            )

    def platforms(self) -> list[str]:
        """Return the platforms to time."""
        return [name for name in _PLATFORMS if name in _registered()] if self.platform is None else [self.platform]

    def default_plan(self) -> EvaluationPlan:
        """Return a plan that works everywhere, for the time before plans were timed."""
        return EvaluationPlan(self.platform or "Reference")

    def only_plan(self) -> EvaluationPlan | None:
        """Return the plan where the constraints leave just one."""
        if self.platform is None or self.workers is None or (self.workers > 1 and self.kind is None):
            return None
        return EvaluationPlan(self.platform, self.workers, self.kind or "threads")

    def pooled_plans(self, platform: str, system: openmm.System) -> list[EvaluationPlan]:
        """Return the plans with several Contexts on a platform."""
        workers = (os.cpu_count() or 1) if self.workers is None else self.workers
        if workers == 1 or platform not in _SHARED:
            return []
        kinds: list[WorkerKind] = ["threads", "processes"] if self.kind is None else [self.kind]
        if not ProcessPool.possible() or _serialised(system) is None:
            kinds = [kind for kind in kinds if kind == "threads"]
        return [EvaluationPlan(platform, workers, kind) for kind in kinds]


def stored_plan(system: openmm.System, constraints: PlanConstraints) -> EvaluationPlan | None:
    """Return the stored plan for this System on this machine, or None."""
    description = _describe(system, constraints)
    folder = None if description is None else Cache(cache_folder(_KIND)).find(description)
    return None if folder is None else EvaluationPlan(**json.loads((folder / _FILE).read_text()))


def fastest_plan(system: openmm.System, constraints: PlanConstraints, sample: ConfigurationBatch) -> EvaluationPlan:
    """Time the possible plans with configurations of the System, and store the fastest.

    Raises:
        ConfigurationError: when no platform can evaluate the System.
    """
    singles: dict[EvaluationPlan, float] = {}
    for platform in constraints.platforms():
        # A platform without its device, or without a kernel for one of the forces, is skipped.
        with contextlib.suppress(openmm.OpenMMException):
            plan = EvaluationPlan(platform)
            singles[plan] = _seconds(plan.pool(system), sample, min(singles.values(), default=np.inf))
    if not singles:
        raise ConfigurationError(f"OpenMM cannot evaluate this System on any of {', '.join(constraints.platforms())}")
    fastest = min(singles.values())
    times: dict[EvaluationPlan, float] = {}
    for single, seconds in singles.items():
        for plan in constraints.pooled_plans(single.platform, system) if seconds < _HOPELESS * fastest else []:
            pool = plan.pool(system)
            try:
                times[plan] = _WORTH[plan.kind] * _seconds(pool, sample, fastest)
            except WorkerError as error:
                warnings.warn(f"batches of this System are evaluated without worker processes: {error}", stacklevel=5)
            finally:
                pool.close()
    if constraints.workers is None or not times:
        times.update(singles)
    best = min(times, key=lambda plan: times[plan])
    description = _describe(system, constraints)
    if description is not None:
        # Where nothing can be stored, plans are timed once per process.
        with contextlib.suppress(OSError), Cache(cache_folder(_KIND)).making(description) as folder:
            (folder / _FILE).write_text(json.dumps(asdict(best)))
    return best


def _seconds(pool: ContextPool, sample: ConfigurationBatch, fastest: float) -> float:
    """Return the seconds per configuration; a plan that is hopelessly slow is timed with one only."""

    def timed(count: int) -> float:
        batch = sample.selected(np.arange(count) % len(sample))
        begin = time.perf_counter()
        for _ in pool.evaluate(batch):
            pass
        return (time.perf_counter() - begin) / count

    timed(1)  # the first call includes the set-up
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


def _describe(system: openmm.System, constraints: PlanConstraints) -> dict[str, Any] | None:
    """Return what the best plan depends on; None for a System that cannot be serialised, whose plan is not stored."""
    xml = _serialised(system)
    if xml is None:
        return None
    return {
        "system": hashlib.sha256(xml.encode()).hexdigest(),
        "choices": asdict(constraints),
        "platforms": constraints.platforms(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "openmm": openmm.version.version,
    }
