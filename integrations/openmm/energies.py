"""Energies and forces of many configurations of one System, at the speed of the cores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from ...core.cache import Cache, cache_folder
from ...core.errors import ConfigurationError
from ...core.machine import machine

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_WORTH_A_THREAD = 16  # fewer configurations than this are done before a second thread is awake
_TRIED = 96  # configurations that each plan is timed with
_KIND, _FILE = "plans", "plan.json"  # in the cache
_PLATFORMS = ("Reference", "CPU", "CUDA", "HIP", "OpenCL")


@dataclass(frozen=True)
class Plan:
    """How configurations are evaluated.

    Attributes:
        platform: name of the OpenMM platform.
        workers: number of Contexts, each in a thread of its own.
    """

    platform: str
    workers: int


class OpenMMEnergy:
    """Batched energies of an OpenMM System: one Context a thread, raw buffers, no unit objects.

    OpenMM releases the interpreter lock while it computes, so Python threads scale where a configuration takes long enough.
    Two implicit-solvent models of one molecule can want opposite platforms (an OBC model that OpenMM has as a force of its
    own is fastest on Reference, one built from CustomGBForce ten times faster on CPU), so by default the first call with
    enough configurations tries the possible plans, for a fraction of a second, and keeps the fastest; it is remembered for
    this System and machine in the user's cache folder. Reference works in double precision, the CPU platform in single (about
    1e-4 kJ/mol).

    Args:
        system: the System; not changed, and not kept in sync with later changes.
        platform: name of the OpenMM platform; tried out where None.
        workers: number of Contexts and threads; where None, as many as there are cores, or fewer where that is faster.
    """

    def __init__(self, system: openmm.System, platform: str | None = None, workers: int | None = None) -> None:
        if system.usesPeriodicBoundaryConditions():
            raise ConfigurationError(
                "the System is periodic; this evaluator is for isolated molecules: create it with NoCutoff"
            )
        if workers is not None and workers < 1:
            raise ConfigurationError(f"workers must be at least 1, got {workers}")
        self.particles = system.getNumParticles()
        self._system = system
        self._plans = _possible_plans(platform, workers)
        self._team: _Team | None = None
        if len(self._plans) == 1:
            self._team = _Team(system, self._plans[0])

    @property
    def plan(self) -> Plan | None:
        """What was chosen; None before anything was tried."""
        return None if self._team is None else self._team.plan

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` kJ/mol and forces ``(B, N, 3)`` kJ/mol/nm of positions ``(B, N, 3)`` nm.

        A configuration with a position that is not finite, or for which OpenMM fails, gives NaN in energy and forces.

        Raises:
            ConfigurationError: for positions of another shape.
        """
        frames = np.ascontiguousarray(positions, dtype=np.float64)
        if frames.ndim != 3 or frames.shape[1:] != (self.particles, 3):
            raise ConfigurationError(
                f"positions have shape {frames.shape}, expected (configurations, {self.particles}, 3)"
            )
        if self._team is None:
            self._team = self._chosen_team(frames)
        return self._team.evaluate(frames)

    def _chosen_team(self, frames: FloatArray) -> _Team:
        cache, description = Cache(cache_folder(_KIND)), _describe(self._system, self._plans)
        folder = None if description is None else cache.find(description)
        if folder is not None:
            return _Team(self._system, Plan(**json.loads((folder / _FILE).read_text())))
        usable = frames[np.isfinite(frames).all((1, 2))]
        if not len(usable):
            return _Team(self._system, self._plans[0])
        sample = usable[np.arange(_TRIED) % len(usable)]
        times = {plan: _seconds(_Team(self._system, plan), sample) for plan in self._plans}
        best = min(times, key=lambda plan: times[plan])
        if description is not None:
            # Where nothing can be kept, plans are timed once a process.
            with contextlib.suppress(OSError), cache.making(description) as folder:
                (folder / _FILE).write_text(json.dumps(asdict(best)))
        return _Team(self._system, best)


class _Team:
    """Contexts that share the work of a call."""

    def __init__(self, system: openmm.System, plan: Plan) -> None:
        platform = openmm.Platform.getPlatformByName(plan.platform)
        properties = {"Threads": "1"} if plan.platform == "CPU" else {}
        self.plan = plan
        self._integrators = [openmm.VerletIntegrator(0.001) for _ in range(plan.workers)]
        self._contexts = [openmm.Context(system, integrator, platform, properties) for integrator in self._integrators]
        self._pool = ThreadPoolExecutor(plan.workers) if plan.workers > 1 else None

    def evaluate(self, frames: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` kJ/mol and forces ``(B, N, 3)`` kJ/mol/nm of frames ``(B, N, 3)`` nm.

        NaN where a position is not finite or OpenMM fails.
        """
        energies, forces = np.full(len(frames), np.nan), np.full(frames.shape, np.nan)
        if self._pool is None or len(frames) < _WORTH_A_THREAD:
            _evaluate(self._contexts[0], frames, energies, forces)
            return energies, forces
        edges = np.linspace(0, len(frames), len(self._contexts) + 1).astype(int)
        tasks = [
            self._pool.submit(_evaluate, context, frames[a:b], energies[a:b], forces[a:b])
            for context, a, b in zip(self._contexts, edges[:-1], edges[1:], strict=True)
        ]
        for task in tasks:
            task.result()
        return energies, forces


def _evaluate(context: openmm.Context, positions: FloatArray, energies: FloatArray, forces: FloatArray) -> None:
    kind = openmm.State.Forces
    for index in np.flatnonzero(np.isfinite(positions).all((1, 2))):
        try:
            context.setPositions(positions[index])
            state = context.getState(getForces=True, getEnergy=True)
        except openmm.OpenMMException:
            continue  # stays NaN, as promised
        try:
            # The route of OpenMM's Python layer that makes neither unit objects nor lists of Vec3.
            state._getVectorAsNumpy(kind, forces[index])
        except AttributeError:
            forces[index] = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        energies[index] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


def _possible_plans(platform: str | None, workers: int | None) -> list[Plan]:
    registered = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    platforms = [name for name in _PLATFORMS if name in registered] if platform is None else [platform]
    cores = os.cpu_count() or 1
    counts = [workers] if workers is not None else sorted({1, cores})
    # A GPU is shared by its Contexts: more of them would only wait for each other.
    return [Plan(name, count) for name in platforms for count in (counts if name in ("Reference", "CPU") else [1])]


def _seconds(team: _Team, sample: FloatArray) -> float:
    team.evaluate(sample[: 2 * _WORTH_A_THREAD])  # the first calls set things up
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        team.evaluate(sample)
        times.append(time.perf_counter() - begin)
    return min(times)


def _describe(system: openmm.System, plans: list[Plan]) -> dict[str, Any] | None:
    """Return what the best plan depends on; None for a System that cannot be serialised, whose plan is not kept."""
    try:
        xml = openmm.XmlSerializer.serialize(system)
    except Exception:
        return None
    return {
        "system": hashlib.sha256(xml.encode()).hexdigest(),
        "plans": [asdict(plan) for plan in plans],
        "machine": machine(),
        "cores": os.cpu_count(),
        "openmm": openmm.version.version,
    }


def energy_from_openmm(target: object) -> OpenMMEnergy:
    """Return an evaluator for an ``openmm.System``; raises ConfigurationError for anything else of OpenMM."""
    if not isinstance(target, openmm.System):
        raise ConfigurationError(f"cannot evaluate energies of an openmm.{type(target).__name__}: give the System")
    return OpenMMEnergy(target)
