"""The stage trajectory: read trajectories, evaluate them, and refuse what cannot be samples of the System."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...core.energy import BatchedEnergy
from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...core.statistics.bootstrap import Estimate
from ...core.statistics.estimates import mean_with_error
from ...core.units import thermal_energy
from ...integrations.mdtraj.trajectories import digest_of_file, samples_from_trajectory
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.sampling.dynamics import Trajectory, load_trajectory, save_trajectory
from ...integrations.openmm.sampling.relaxation import RelaxationRun, run_relaxation
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines
from ..stages import Stage
from .configuration import TrajectoryFiles, Workflow
from .simulate import equivalent_hydrogens, joined, permuted

_RIGID = 8e-4  # nm: a bond that varies less was constrained; rounding to 0.001 nm gives 4e-4, thermal motion 2e-3
_STEP = 1e-5  # nm, of the difference of forces
_CHUNK = 250  # structures of one relaxation: what an interruption loses
_TOLERANCE = 0.1  # relative deviation of the configurational temperature that is not worth stopping for
_ERRORS = 5.0  # standard errors that it must deviate by, besides


def trajectory_stage(
    workflow: Workflow, settings: TrajectoryFiles, molecule: MolecularSystem, folder: Path, machines: Machines
) -> Stage:
    """Return the stage that reads training data from trajectories; relative paths start at ``folder``."""
    files = [folder / file for file in settings.files]
    for file in files:
        if not file.is_file():
            raise ConfigurationError(f"the trajectory {file} does not exist")
    inputs = {
        "system": molecule.system_xml,
        "temperature": workflow.molecule.temperature,
        "files": [digest_of_file(file) for file in files],
        "settings": json.loads(settings.model_dump_json(exclude={"files"})),
        "step_fs": workflow.simulate.step_fs,
        "seed": workflow.seed,
    }
    return Stage(
        "trajectory", "training data from files",
        lambda stage, _: _read(workflow, settings, molecule, files, stage, machines), inputs, takes_place_of="simulate",
    )  # fmt: skip


def _read(
    workflow: Workflow,
    settings: TrajectoryFiles,
    molecule: MolecularSystem,
    files: list[Path],
    folder: Path,
    machines: Machines,
) -> dict[str, Any]:
    particles = particles_from_topology(molecule.topology, molecule.system)
    temperature = workflow.molecule.temperature
    training, held_out = [], []
    for file in files:
        samples = samples_from_trajectory(
            file, particles, temperature, stride=settings.stride, discard=settings.discard
        )
        # The end of each file is held out: neighbouring frames are too alike to test on.
        kept = max(round(len(samples) * (1.0 - settings.held_out)), 1)
        training.append(samples.positions[:kept].astype(np.float64))
        held_out.append(samples.positions[kept:].astype(np.float64))
    counts = sum(map(len, training)), sum(map(len, held_out))
    if min(counts) < 1:
        raise ConfigurationError(
            f"{counts[0]} frames to train on and {counts[1]} to test with: give longer trajectories"
        )
    positions = np.concatenate([*training, *held_out])
    energy = machines.energy(molecule)
    if settings.relaxation_steps:
        frames = _relaxed(workflow, settings, molecule, positions, folder, machines.executor)
    else:
        _refuse_constraints(positions, molecule)
        frames = Trajectory(positions, *energy.energies_and_forces(positions))
    _refuse_without_energy(frames, files)
    measured = configurational_temperature(frames, energy, workflow.seed)
    _refuse_other_ensemble(measured, temperature)
    groups = equivalent_hydrogens(molecule)
    parts = {
        "training": permuted(_part(frames, slice(0, counts[0])), groups, workflow.seed),
        "held_out": _part(frames, slice(counts[0], None)),
    }
    for name, part in parts.items():
        save_trajectory(folder / f"{name}.npz", part)
    return {
        "files": [file.name for file in files],
        "training_frames": counts[0],
        "held_out_frames": counts[1],
        "relaxation_steps": settings.relaxation_steps,
        "equivalent_hydrogens": [list(group) for group in groups],
        "configurational_temperature_K": measured.value,
        "configurational_temperature_error_K": measured.error,
    }


def configurational_temperature(frames: Trajectory, energy: BatchedEnergy, seed: int) -> Estimate[float]:
    """Return the temperature that the forces on frames imply, in K: ``k T = <|grad U|^2> / <laplace U>``.

    H. H. Rugh, Phys. Rev. Lett. 78, 772 (1997). It holds for any frames in equilibrium within the basins that they visit, and
    is dominated by the stiffest vibrations: constraints, rounded positions and a wrong force field show as a wrong temperature.
    The Laplacian is a difference of forces along a random direction (M. F. Hutchinson, Commun. Stat. 18, 1059 (1989)).

    Args:
        frames: with the forces of the System.
        energy: of the System.
        seed: random seed of the directions.
    """
    random = np.random.default_rng(seed)
    step = _STEP * random.choice([-1.0, 1.0], frames.positions.shape)
    forward, backward = (energy.energies_and_forces(frames.positions + sign * step)[1] for sign in (1.0, -1.0))
    laplacian = -((forward - backward) * step).sum(axis=(1, 2)) / (2.0 * _STEP**2)
    squared = np.square(frames.forces).sum(axis=(1, 2))
    value = float(squared.mean() / laplacian.mean() / thermal_energy(1.0))
    # The error of a quotient of averages, to first order.
    residual = (squared / thermal_energy(1.0) - value * laplacian) / laplacian.mean()
    return Estimate(value, float(mean_with_error(residual, np.zeros(len(residual))).error))


def _relaxed(
    workflow: Workflow,
    settings: TrajectoryFiles,
    molecule: MolecularSystem,
    positions: np.ndarray[Any, Any],
    folder: Path,
    executor: Executor,
) -> Trajectory:
    runs = [
        RelaxationRun(
            molecule.system_xml, positions[start : start + _CHUNK], workflow.molecule.temperature,
            workflow.simulate.step_fs / 1000.0, settings.relaxation_friction_per_ps, settings.relaxation_steps,
            workflow.seed * 10_007 + start, folder / "relaxed" / f"{number:05d}.npz",
        )
        for number, start in enumerate(range(0, len(positions), _CHUNK))
    ]  # fmt: skip
    waiting = [run for run in runs if not run.file.is_file()]
    for file, relaxed in track(executor(run_relaxation, waiting), "relaxing frames", len(waiting)):
        save_trajectory(file, relaxed)
    return joined([load_trajectory(run.file) for run in runs])


def _refuse_constraints(positions: np.ndarray[Any, Any], molecule: MolecularSystem) -> None:
    bonds = [(bond.atom1, bond.atom2) for bond in molecule.topology.bonds()]
    if len(positions) < 10 or not bonds:
        return
    first, second = ([atom.index for atom in side] for side in zip(*bonds, strict=True))
    spread = np.linalg.norm(positions[:, first] - positions[:, second], axis=2).std(axis=0)
    rigid = np.flatnonzero(spread < _RIGID)
    if len(rigid):
        a, b = bonds[int(rigid[0])]
        raise ConfigurationError(
            f"{len(rigid)} of {len(bonds)} bonds have a constant length in the trajectory, the first is {a.name}-{b.name}: it "
            "was simulated with constraints, which the System does not have. Let short dynamics without them set the bonds in "
            "motion, by relaxation_steps = 500 in [trajectory] (flowbridge train --relaxation-steps 500), or simulate with "
            "constraints=None"
        )


def _refuse_without_energy(frames: Trajectory, files: list[Path]) -> None:
    broken = np.flatnonzero(~np.isfinite(frames.energies))
    if len(broken):
        raise NonFiniteEnergyError(
            f"the System gives no finite energy for {len(broken)} of {len(frames.energies)} frames of "
            f"{', '.join(file.name for file in files)}, the first is number {broken[0]}: do trajectory, topology and System "
            "belong together, with atoms in one order and lengths in the unit of their format?"
        )


def _refuse_other_ensemble(measured: Estimate[float], temperature: float) -> None:
    deviation = abs(measured.value - temperature)
    if deviation > _TOLERANCE * temperature and deviation > _ERRORS * measured.error:
        raise ConfigurationError(
            f"by the forces on them the frames are at {measured.value:.0f} +- {measured.error:.0f} K in this System, not at "
            f"{temperature:g} K: they come from another temperature, another force field, an equilibration (leave its frames "
            "out by discard), or were rounded (XTC). relaxation_steps = 500 in [trajectory] (flowbridge train "
            "--relaxation-steps 500) takes the frames as starting structures only"
        )


def _part(frames: Trajectory, selection: slice) -> Trajectory:
    return Trajectory(frames.positions[selection], frames.energies[selection], frames.forces[selection])
