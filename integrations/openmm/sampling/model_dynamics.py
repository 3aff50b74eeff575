"""Molecular dynamics of a model file from the beginning to the end: trajectory, table, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import openmm
import torch
from openmm import app, unit

from ....core.errors import ConfigurationError, NonFiniteEnergyError
from ....core.potential import Particles
from ..forces.add_potential import particle_system, python_force
from ..forces.computation import OpenMMEvaluator
from ..forces.matching import matching_particles
from .dynamics import reason_of, save_arrays

_COLUMNS = "step,time (ps),potential energy (kJ/mol),kinetic energy (kJ/mol),temperature (K)\n"
_CHECKPOINT_EVERY = 50  # frames: what an interruption loses at most
_APART = 3.0  # times the length of a bond in the structure: what no bond reaches


@dataclass(frozen=True)
class ModelDynamics:
    """Dynamics of the particles of a model file under nothing but the model.

    Attributes:
        model: path of the model file.
        structure: PDB or mmCIF file with the same particles in the same order; its box is that of a periodic model.
        output: path without ending: ``.dcd``, ``.csv`` and ``.checkpoint.npz`` are added.
        steps: of the whole run.
        temperature: K; None for the model's own.
        step_fs: time step.
        friction_per_ps: of the Langevin thermostat; None for constant energy.
        frame_interval: steps between frames.
        hydrogen_mass: amu; None keeps the masses.
        minimise: minimise the energy first.
        seed: of velocities and noise.
        platform: of OpenMM; None for the fastest that has the potential's precision, Reference.
    """

    model: Path
    structure: Path
    output: Path
    steps: int
    temperature: float | None = None
    step_fs: float = 1.0
    friction_per_ps: float | None = 1.0
    frame_interval: int = 100
    hydrogen_mass: float | None = None
    minimise: bool = False
    seed: int = 1
    platform: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.frame_interval < 1 or self.steps % self.frame_interval:
            raise ConfigurationError(
                f"{self.steps} steps with a frame every {self.frame_interval}: give positive numbers, the first a multiple of "
                "the second"
            )
        if not self.step_fs > 0.0 or (self.friction_per_ps is not None and not self.friction_per_ps > 0.0):
            raise ConfigurationError(
                f"the time step ({self.step_fs} fs) and the friction ({self.friction_per_ps}/ps) must be positive"
            )

    def file(self, ending: str) -> Path:
        """Return the path of an output file."""
        return self.output.with_name(self.output.name + ending)


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps done, of them in this call, and what the last frame had."""

    step: int
    done_now: int
    potential_energy: float
    temperature: float


def run_model_dynamics(run: ModelDynamics, announce: Callable[[Progress], object] = lambda progress: None) -> Progress:
    """Run, or continue what an interruption left, and return the end.

    Checkpoints are written every fifty frames and at the end. A run that is continued repeats the numbers of an undisturbed one
    (same machine and platform); more steps than before extend it.

    Args:
        run: what to do.
        announce: called after each frame.

    Raises:
        ConfigurationError: for settings that cannot be used, or files of another run under the same name.
        NonFiniteEnergyError: when energy or positions stop being finite; the frames before are in the files.
    """
    evaluator = OpenMMEvaluator.of(run.model)
    settings = _settings(run, evaluator)
    simulation, temperature = _simulation(run, evaluator)
    before = _restored(run, simulation, settings) if run.file(".checkpoint.npz").is_file() else None
    step = 0 if before is None else before
    if before is None:
        _start(run, simulation, temperature)
    progress = Progress(step, 0, *_energies(simulation)[::2])
    with _opened(run, simulation, evaluator.metadata.particles, appending=before is not None) as files:
        unsaved = 0
        while step < run.steps:
            try:
                simulation.step(run.frame_interval)
                progress = files.write(simulation, step + run.frame_interval, progress.done_now + run.frame_interval)
            except (openmm.OpenMMException, ValueError) as error:
                reason = reason_of(error).rstrip(".")
                raise NonFiniteEnergyError(
                    f"dynamics stopped between steps {step} and {step + run.frame_interval}: {reason}. In the last good frame "
                    f"{evaluator.potential.describe_strain(torch.from_numpy(files.last))}. "
                    f"The {step // run.frame_interval} frames before are in {run.file('.dcd')}; "
                    "shorten the time step, or start from a relaxed structure (minimise)"
                ) from error
            step += run.frame_interval
            unsaved += 1
            if unsaved == _CHECKPOINT_EVERY or step >= run.steps:
                files.checkpoint(run, simulation, step, settings)
                unsaved = 0
            announce(progress)
    return progress


def _simulation(run: ModelDynamics, evaluator: OpenMMEvaluator) -> tuple[app.Simulation, float]:
    metadata = evaluator.metadata
    temperature = run.temperature if run.temperature is not None else metadata.temperature
    if temperature is None:
        raise ConfigurationError(f"{run.model} names no temperature: give one")
    if not run.structure.is_file():
        raise ConfigurationError(f"the structure file {run.structure} does not exist")
    reader = app.PDBxFile if run.structure.suffix.lower() in (".cif", ".mmcif") else app.PDBFile
    structure = reader(str(run.structure))
    system = particle_system(evaluator.potential, hydrogen_mass=run.hydrogen_mass)
    if structure.topology.getNumAtoms() != system.getNumParticles():
        raise ConfigurationError(
            f"{run.structure} has {structure.topology.getNumAtoms()} particles, {run.model} {system.getNumParticles()}"
        )
    box = structure.topology.getPeriodicBoxVectors()
    if metadata.periodic and box is None:
        raise ConfigurationError(f"{run.model} is periodic, and {run.structure} has no box (CRYST1)")
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)
    matching_particles(system, metadata, structure.topology, None)
    system.addForce(python_force(evaluator))
    if run.friction_per_ps is None:
        integrator: openmm.Integrator = openmm.VerletIntegrator(run.step_fs / 1000.0)
    else:
        integrator = openmm.LangevinMiddleIntegrator(temperature, run.friction_per_ps, run.step_fs / 1000.0)
        integrator.setRandomNumberSeed(run.seed)
    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    platform = run.platform or "Reference"
    if platform not in names:
        raise ConfigurationError(f"OpenMM has no platform {platform!r} here, it has {', '.join(names)}")
    simulation = app.Simulation(structure.topology, system, integrator, openmm.Platform.getPlatform(platform))
    simulation.context.setPositions(structure.positions)
    return simulation, float(temperature)


def _start(run: ModelDynamics, simulation: app.Simulation, temperature: float) -> None:
    for ending in (".dcd", ".csv"):
        if run.file(ending).exists():
            raise ConfigurationError(
                f"{run.file(ending)} is there, but no checkpoint to continue it from: remove it, or give another output"
            )
    run.output.parent.mkdir(parents=True, exist_ok=True)
    if run.minimise:
        simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(temperature, run.seed)


def _settings(run: ModelDynamics, evaluator: OpenMMEvaluator) -> str:
    """Return what must be the same for a run to be continued."""
    free = ("steps", "output", "model", "structure")
    settings = {key: str(value) for key, value in dataclasses.asdict(run).items() if key not in free}
    digest = None if evaluator.source is None else evaluator.source.digest
    return json.dumps({**settings, "model": digest, "openmm": openmm.__version__}, sort_keys=True)


def _restored(run: ModelDynamics, simulation: app.Simulation, settings: str) -> int:
    """Bring the simulation and its files to the last checkpoint, and return the step."""
    file = run.file(".checkpoint.npz")
    with np.load(file, allow_pickle=False) as stored:
        about, state = json.loads(str(stored["about"])), stored["state"].tobytes()
    if about["settings"] != settings:
        raise ConfigurationError(
            f"{file} is of a run with other settings or another model: give another output, or remove its files to start again"
        )
    for ending, size in about["bytes"].items():
        written = run.file(ending)
        if not written.is_file() or written.stat().st_size < size:
            raise ConfigurationError(
                f"{written} is shorter than at the checkpoint in {file}: restore it, or remove both"
            )
        with written.open("r+b") as stream:
            stream.truncate(size)
            if ending == ".dcd":
                _count_frames(stream, int(about["step"]) // run.frame_interval, run.frame_interval)
    simulation.context.loadCheckpoint(state)
    simulation.currentStep = int(about["step"])
    return int(about["step"])


def _count_frames(stream: BinaryIO, frames: int, interval: int) -> None:
    """Write the number of frames, and the step of the last, where the header of a DCD file has them."""
    stream.seek(8)
    stream.write(struct.pack("<i", frames))
    stream.seek(20)
    stream.write(struct.pack("<i", frames * interval))


def _energies(simulation: app.Simulation) -> tuple[float, float, float]:
    """Return potential and kinetic energy (kJ/mol) and temperature (K)."""
    state = simulation.context.getState(energy=True)
    potential = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    kinetic = state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)
    constant = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    return potential, kinetic, 2.0 * kinetic / (3.0 * simulation.system.getNumParticles() * constant)


class _Files:
    """The open trajectory and table of a run."""

    def __init__(
        self,
        trajectory: app.DCDFile,
        stream: BinaryIO,
        table: TextIO,
        particles: Particles,
        start: np.ndarray[Any, np.dtype[np.float64]],
    ) -> None:
        self.trajectory, self.stream, self.table = trajectory, stream, table
        self.particles, self.last = particles, start
        self._bonds = np.array(particles.bonds, dtype=int).reshape(-1, 2)
        self._limits = _APART * self._lengths(start)

    def _lengths(self, positions: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        i, j = self._bonds.T
        lengths: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.norm(positions[i] - positions[j], axis=1)
        return lengths

    def _refuse_broken(self, positions: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        broken = np.flatnonzero(self._lengths(positions) > self._limits)
        if len(broken):
            i, j = self._bonds[broken[0]]
            raise ValueError(
                f"{self.particles.label(int(i))} and {self.particles.label(int(j))}, which are bonded, have flown apart to "
                f"{self._lengths(positions)[broken[0]]:.3g} nm"
            )

    def write(self, simulation: app.Simulation, step: int, done_now: int) -> Progress:
        """Write a frame; raises ValueError where energies are not finite or bonds are broken, before anything is written."""
        potential, kinetic, temperature = _energies(simulation)
        if not np.isfinite([potential, kinetic]).all():
            raise ValueError(f"potential energy {potential} and kinetic energy {kinetic} kJ/mol")
        state = simulation.context.getState(positions=True)
        positions = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
        self._refuse_broken(positions)
        self.last = positions
        self.trajectory.writeModel(state.getPositions(asNumpy=True), periodicBoxVectors=state.getPeriodicBoxVectors())
        time = state.getTime().value_in_unit(unit.picosecond)
        self.table.write(f"{step},{time:.6f},{potential:.6f},{kinetic:.6f},{temperature:.3f}\n")
        self.table.flush()
        return Progress(step, done_now, potential, temperature)

    def checkpoint(self, run: ModelDynamics, simulation: app.Simulation, step: int, settings: str) -> None:
        """Write the checkpoint atomically; the files next to it may be longer by then, never shorter."""
        self.stream.flush()
        about = {
            "step": step,
            "settings": settings,
            "bytes": {ending: run.file(ending).stat().st_size for ending in (".dcd", ".csv")},
        }
        state: np.ndarray[Any, Any] = np.frombuffer(simulation.context.createCheckpoint(), dtype=np.uint8)
        save_arrays(run.file(".checkpoint.npz"), about=np.array(json.dumps(about)), state=state)


@contextmanager
def _opened(
    run: ModelDynamics, simulation: app.Simulation, particles: Particles, *, appending: bool
) -> Iterator[_Files]:
    """Open the trajectory and the table, new or at their ends."""
    dcd, csv = run.file(".dcd"), run.file(".csv")
    with dcd.open("r+b" if appending else "w+b") as stream, csv.open("a" if appending else "w") as table:
        if not appending:
            table.write(_COLUMNS)
        trajectory = app.DCDFile(
            stream, simulation.topology, run.step_fs / 1000.0 * unit.picosecond, run.frame_interval, run.frame_interval,
            append=appending,
        )  # fmt: skip
        state = simulation.context.getState(positions=True)
        start = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
        yield _Files(trajectory, stream, table, particles, start)
