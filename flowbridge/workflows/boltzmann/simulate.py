"""The stage simulate: training data from many short trajectories, started in the known basins.

The populations of the basins in the data are those of the starts, not of the ensemble: the flow and its weights have to
put them right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.energies.batched import OpenMMEnergy
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.sampling.dynamics import (
    LangevinRun,
    Trajectory,
    load_trajectory,
    run_all,
    save_arrays,
    save_trajectory,
)
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..stages import Stage, StageFolder
from .basins import starting_structures
from .configuration import Workflow

_SAME_ENERGY = 1e-6  # kJ/mol: two labellings of one structure are equivalent


@dataclass(frozen=True)
class TrainingFrames:
    """Training and held-out frames."""

    training: Trajectory
    held_out: Trajectory


def simulation_stage(workflow: Workflow, molecule: MolecularSystem, executor: Executor) -> Stage:
    """Return the stage that simulates training data; its folder holds ``training.npz`` and ``held_out.npz``."""
    inputs = {
        "system": molecule.system_xml,
        "positions": molecule.positions.tolist(),
        "molecule": json.loads(workflow.molecule.model_dump_json(exclude={"name"})),
        "simulate": json.loads(workflow.simulate.model_dump_json()),
        "seed": workflow.seed,
    }
    return Stage("simulate", "training data", lambda folder, _: _simulate(workflow, molecule, folder, executor), inputs)


def load_frames(stage: StageFolder) -> TrainingFrames:
    """Return the frames that the stage kept."""
    return TrainingFrames(
        load_trajectory(stage.folder / "training.npz"), load_trajectory(stage.folder / "held_out.npz")
    )


def _simulate(workflow: Workflow, molecule: MolecularSystem, folder: Path, executor: Executor) -> dict[str, Any]:
    settings = workflow.simulate
    runs = _runs(workflow, molecule, folder, executor)
    waiting = [run for run in runs if not run.file.is_file()]
    for _ in track(run_all(waiting, executor), "trajectories", len(waiting)):
        continue
    # Whole trajectories are held out: neighbouring frames of one trajectory are too alike to test on.
    every = max(round(1.0 / settings.held_out), 2)
    kept = [load_trajectory(run.file) for run in runs]
    held_out = joined([t for index, t in enumerate(kept) if index % every == every - 1] or kept[-1:])
    training = joined([t for index, t in enumerate(kept) if index % every != every - 1] or kept)
    groups = equivalent_hydrogens(molecule)
    training = permuted(training, groups, workflow.seed)
    for name, part in (("training", training), ("held_out", held_out)):
        save_trajectory(folder / f"{name}.npz", part)
    steps = sum(run.equilibration_steps + run.frame_interval * run.frames for run in runs)
    return {
        "trajectories": len(runs),
        "steps": steps,
        "nanoseconds": steps * settings.step_fs * 1e-6,
        "training_frames": len(training.energies),
        "held_out_frames": len(held_out.energies),
        "equivalent_hydrogens": [list(group) for group in groups],
        "starts": sorted({run.file.stem.rpartition("_")[0] for run in runs}),
    }


def _runs(workflow: Workflow, molecule: MolecularSystem, folder: Path, executor: Executor) -> list[LangevinRun]:
    settings = workflow.simulate
    runs: list[LangevinRun] = []
    file = folder / "starts.npz"
    starts = starting_structures(workflow, molecule, executor)
    save_arrays(file, **{start.name: start.positions for start in starts})
    for start in starts:
        for number in range(start.trajectories):
            runs.append(
                LangevinRun(
                    molecule.system_xml, start.positions, workflow.molecule.temperature, settings.step_fs / 1000.0,
                    settings.friction_per_ps, settings.equilibration_steps, settings.frame_interval, start.frames,
                    workflow.seed * 10_007 + len(runs), folder / "trajectories" / f"{start.name}_{number:03d}.npz",
                )
            )  # fmt: skip
    return runs


def joined(parts: list[Trajectory]) -> Trajectory:
    """Return the frames of all parts in one trajectory."""
    return Trajectory(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.energies for part in parts]),
        np.concatenate([part.forces for part in parts]),
    )


def equivalent_hydrogens(molecule: MolecularSystem) -> list[tuple[int, ...]]:
    """Return groups of three hydrogens on one atom (methyl and the like) that the force field cannot tell apart.

    Tested on the energy of a distorted structure, not assumed from names.
    """
    particles = particles_from_topology(molecule.topology, molecule.system)
    zmatrix = build_zmatrix(particles)
    children: dict[int, list[int]] = {}
    for row in zmatrix.rows:
        children.setdefault(row.bond, []).append(row.atom)
    energy = OpenMMEnergy(molecule.system, workers=1)
    distorted = molecule.positions + np.random.default_rng(0).normal(0.0, 0.003, molecule.positions.shape)
    groups = []
    for atoms in children.values():
        hydrogens = [atom for atom in atoms if particles.atomic_numbers[atom] == 1]
        if len(hydrogens) != 3 or len(atoms) != 3:
            continue
        turned = distorted.copy()
        turned[hydrogens] = distorted[np.roll(hydrogens, 1)]
        energies, _ = energy.energies_and_forces(np.stack([distorted, turned]))
        if abs(energies[1] - energies[0]) < _SAME_ENERGY:
            groups.append(tuple(hydrogens))
    return groups


def permuted(trajectory: Trajectory, groups: list[tuple[int, ...]], seed: int) -> Trajectory:
    """Return the frames with each group of hydrogens cyclically relabelled at random.

    An exact symmetry of the ensemble (and unlike an exchange of two, one that keeps the handedness of the group): it gives
    the three basins of a methyl rotor equal populations without waiting for it to turn.
    """
    generator = np.random.default_rng(seed)
    positions, forces = trajectory.positions.copy(), trajectory.forces.copy()
    for group in groups:
        turns = generator.integers(0, len(group), len(positions))
        for turn in range(1, len(group)):
            frames = np.flatnonzero(turns == turn)
            source, target = np.ix_(frames, np.roll(group, turn)), np.ix_(frames, np.asarray(group))
            positions[target], forces[target] = trajectory.positions[source], trajectory.forces[source]
    return Trajectory(positions, trajectory.energies, forces)
