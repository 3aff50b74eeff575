"""Langevin trajectories in raw buffers, many at the same time in processes, each with its own seed and file.

Processes are used rather than threads because OpenMM's Reference platform draws the random numbers of all Contexts of a
process from one generator: two Contexts that step at the same time would not repeat their numbers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from ....core.atomic_files import write_whole
from ....core.errors import NonFiniteEnergyError
from ....core.execution.executors import Executor

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Trajectory:
    """Frames of one run: positions ``(F, N, 3)`` nm, energies ``(F,)`` kJ/mol, forces ``(F, N, 3)`` kJ/mol/nm."""

    positions: FloatArray
    energies: FloatArray
    forces: FloatArray


@dataclass(frozen=True)
class LangevinRun:
    """A Langevin trajectory, complete enough to be run in another process.

    Attributes:
        system_xml: serialised System.
        positions: starting positions ``(N, 3)`` nm.
        temperature: temperature, K.
        step_ps: time step, ps.
        friction: friction, 1/ps.
        equilibration_steps: number of steps before the first frame.
        frame_interval: number of steps between frames.
        frames: number of frames.
        seed: random seed of velocities and noise.
        file: npz file of the frames.
        energy_groups: force groups whose energy and forces are saved; all where None.
        saved_particles: number of particles, from the first, that frames hold; all where None.
        platform: name of the OpenMM platform; ``CPU`` on one thread.
    """

    system_xml: str
    positions: FloatArray
    temperature: float
    step_ps: float
    friction: float
    equilibration_steps: int
    frame_interval: int
    frames: int
    seed: int
    file: Path
    energy_groups: frozenset[int] | None = None
    saved_particles: int | None = None
    platform: str = "Reference"


def reference_context(system: openmm.System, integrator: openmm.Integrator) -> openmm.Context:
    """Return a Context on the Reference platform: the fastest for one small molecule, and deterministic."""
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))


def _context(run: LangevinRun, integrator: openmm.Integrator) -> openmm.Context:
    system = openmm.XmlSerializer.deserialize(run.system_xml)
    if run.platform == "Reference":
        return reference_context(system, integrator)
    # One thread per process: runs at the same time share the cores.
    properties = {"Threads": "1", "DeterministicForces": "true"} if run.platform == "CPU" else {}
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(run.platform), properties)


def run_langevin(run: LangevinRun) -> Trajectory:
    """Run one trajectory and return its frames.

    Raises NonFiniteEnergyError when the energy of a frame is not finite; OpenMM itself raises when positions are.
    """
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, run.friction, run.step_ps)
    integrator.setRandomNumberSeed(run.seed)
    context = _context(run, integrator)
    context.setPositions(run.positions)
    context.setVelocitiesToTemperature(run.temperature, run.seed)
    integrator.step(run.equilibration_steps)
    count = len(run.positions) if run.saved_particles is None else run.saved_particles
    shape = (run.frames, count, 3)
    positions, forces, energies = np.empty(shape), np.empty(shape), np.empty(run.frames)
    all_positions, all_forces = np.empty_like(run.positions), np.empty_like(run.positions)
    arguments = {} if run.energy_groups is None else {"groups": set(run.energy_groups)}
    for frame in range(run.frames):
        integrator.step(run.frame_interval)
        state = context.getState(getPositions=True, getForces=True, getEnergy=True, **arguments)
        copy_vectors(state, all_positions, all_forces)
        positions[frame], forces[frame] = all_positions[:count], all_forces[:count]
        energies[frame] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    if not np.isfinite(energies).all():
        first = int(np.flatnonzero(~np.isfinite(energies))[0])
        raise NonFiniteEnergyError(
            f"the energy of frame {first} of {run.file.name} is {energies[first]}: shorten the time step "
            f"({run.step_ps} ps) or start from a relaxed structure"
        )
    return Trajectory(positions, energies, forces)


def reason_of(error: Exception) -> str:
    """Return the message of an error without the traceback that OpenMM appends to errors of Python forces."""
    return str(error).partition("\n\nTraceback")[0]


def copy_vectors(state: openmm.State, positions: FloatArray, forces: FloatArray | None = None) -> None:
    """Copy positions (nm) and forces (kJ/mol/nm) of a State into C-contiguous ``(N, 3)`` float64 buffers.

    OpenMM's own buffer copy makes neither unit objects nor Vec3 lists; an OpenMM without it uses the public route.
    """
    fast = getattr(state, "_getVectorAsNumpy", None)
    if fast is not None:
        fast(openmm.State.Positions, positions)
        if forces is not None:
            fast(openmm.State.Forces, forces)
        return
    positions[:] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    if forces is not None:
        forces[:] = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)


def _run_for_file(run: LangevinRun) -> tuple[Path, Trajectory]:
    return run.file, run_langevin(run)


def save_arrays(file: Path, **arrays: np.ndarray[Any, Any]) -> None:
    """Write an npz file atomically: readers see the old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    write_whole(file.absolute(), stream.getvalue())


def load_trajectory(file: Path) -> Trajectory:
    """Read the frames of a run."""
    with np.load(file, allow_pickle=False) as data:
        return Trajectory(data["positions"], data["energies"], data["forces"])


def save_trajectory(file: Path, trajectory: Trajectory) -> None:
    """Write frames so that :func:`load_trajectory` reads them."""
    save_arrays(file, positions=trajectory.positions, energies=trajectory.energies, forces=trajectory.forces)


def run_all(runs: Sequence[LangevinRun], executor: Executor) -> Iterator[Path]:
    """Run trajectories on an executor; yield each file when it is written.

    Frames are written by this process, so that machines need no common disk. Files that exist are not run again.
    """
    for file, trajectory in executor(_run_for_file, [run for run in runs if not run.file.is_file()]):
        save_trajectory(file, trajectory)
        yield file
