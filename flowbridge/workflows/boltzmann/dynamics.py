"""The stage dynamics: the trained flow as a potential in OpenMM and ASE, and what that shows of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.evaluator import EvaluationOptions, Evaluator
from ...core.execution.executors import ProcessExecutor
from ...core.execution.progress import track
from ...core.statistics.estimates import MINIMUM_BLOCKS, jensen_shannon_divergence, jensen_shannon_noise
from ...flows.boltzmann.generator import BoltzmannGenerator
from ...integrations.openmm.energies.batched import OpenMMEnergy
from ...integrations.openmm.forces.add_potential import add_potential, particle_system
from ...integrations.openmm.sampling.dynamics import save_arrays
from ...integrations.openmm.sampling.flow_dynamics import (
    SINGLE_MOLECULE_DTYPE,
    ConstantEnergyRun,
    PotentialLangevinRun,
    run_constant_energy,
    run_potential_langevin,
)
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..stages import Stage, StageFolder
from .ase_dynamics import AseKind, AseRun, ase_forces, run_ase
from .configuration import Workflow
from .evaluation import force_errors, named_torsions, potential_forces, torsion_histogram
from .simulate import load_frames
from .train import load_generator

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_COMPARED_FRAMES = 100
_STARTS_OFFSET = 77  # seeds: samples that start replicas are not those that are compared with


@dataclass(frozen=True)
class _Task:
    """One of the independent pieces of the stage, for a worker process."""

    name: str
    job: ConstantEnergyRun | PotentialLangevinRun | AseRun


def _perform(task: _Task) -> tuple[str, FloatArray]:
    job = task.job
    if isinstance(job, ConstantEnergyRun):
        return task.name, run_constant_energy(job)
    if isinstance(job, AseRun):
        return task.name, run_ase(job)
    run_potential_langevin(job)
    return task.name, np.empty(0)


def dynamics_stage(workflow: Workflow, molecule: MolecularSystem) -> Stage:
    """Return the stage that runs dynamics under the energy of the flow."""
    inputs = {"dynamics": json.loads(workflow.dynamics.model_dump_json()), "seed": workflow.seed}
    return Stage(
        "dynamics", "dynamics of the flow in OpenMM and ASE",
        lambda folder, done: _run_dynamics(workflow, molecule, done["simulate"], done["train"], folder),
        inputs, needs=("train",), former_name="drive",
    )  # fmt: skip


def _run_dynamics(
    workflow: Workflow, molecule: MolecularSystem, simulated: StageFolder, trained: StageFolder, folder: Path
) -> dict[str, Any]:
    model = load_generator(trained)
    frames = load_frames(simulated).held_out
    tasks = _tasks(workflow, molecule, trained.folder / "model.flow", model, frames.positions, folder)
    made: dict[str, FloatArray] = {}
    waiting = []
    for task in tasks:
        file = folder / f"{task.name}.npz"
        if file.is_file() and not isinstance(task.job, PotentialLangevinRun):
            with np.load(file, allow_pickle=False) as data:
                made[task.name] = data["energy"]
        elif not (isinstance(task.job, PotentialLangevinRun) and task.job.file.is_file()):
            waiting.append(task)
    if waiting:
        _compile_ahead(workflow, trained.folder / "model.flow")
    for name, energy in track(ProcessExecutor(workflow.workers)(_perform, waiting), "dynamics", len(waiting)):
        made[name] = energy
        if len(energy):
            save_arrays(folder / f"{name}.npz", energy=energy)
    results = _energy_conservation(made, model)
    results.update(_langevin_against_samples(workflow, molecule, model, tasks))
    results.update(force_errors(model, frames, workflow.molecule.temperature))
    results.update(_engines_against_each_other(trained.folder / "model.flow", model, frames.positions))
    return results


@dataclass(frozen=True)
class _Program:
    """A model file as one of the dynamics evaluates it."""

    file: Path
    batch: int
    dtype: str | None


def _load(program: _Program) -> None:
    Evaluator.of(program.file, EvaluationOptions(program.batch, dtype=program.dtype))


def _compile_ahead(workflow: Workflow, file: Path) -> None:
    """Compile the two programs of this stage at the same time, so that no dynamics waits for that of another."""
    programs = [_Program(file, workflow.dynamics.replicas, None), _Program(file, 1, SINGLE_MOLECULE_DTYPE)]
    for _ in ProcessExecutor(workflow.workers)(_load, programs):
        pass


def _tasks(
    workflow: Workflow,
    molecule: MolecularSystem,
    file: Path,
    model: BoltzmannGenerator,
    held_out: FloatArray,
    folder: Path,
) -> list[_Task]:
    settings, temperature, seed = workflow.dynamics, workflow.molecule.temperature, workflow.seed
    drawn = model.sample_positions(
        settings.replicas * settings.langevin_runs, torch.Generator().manual_seed(seed + _STARTS_OFFSET)
    ).positions.numpy()
    tasks = [
        _Task(
            f"langevin_{number}",
            PotentialLangevinRun(
                file, drawn[number :: settings.langevin_runs], temperature, settings.langevin_step_fs / 1000.0,
                settings.langevin_friction_per_ps, settings.hydrogen_mass, settings.discarded_steps,
                settings.langevin_steps, settings.frame_interval, seed + number, folder / f"langevin_{number}_frames.npz",
            ),
        )
        for number in range(settings.langevin_runs)
    ]  # fmt: skip
    for number in range(settings.nve_runs):
        start = held_out[(number * len(held_out)) // settings.nve_runs]
        flow = ConstantEnergyRun(
            file, start, temperature, settings.nve_step_fs / 1000.0, settings.equilibration_steps,
            settings.nve_steps, seed + number,
        )  # fmt: skip
        tasks.append(_Task(f"nve_flow_{number}", flow))
        tasks.append(_Task(f"nve_force_field_{number}", replace(flow, source=molecule.system_xml)))
    ase_steps: dict[AseKind, int] = {"nve": settings.ase_nve_steps, "langevin": settings.ase_langevin_steps}
    for kind, steps in ase_steps.items():
        job = AseRun(file, held_out[0], temperature, settings.nve_step_fs, steps, kind, seed)
        tasks.append(_Task(f"ase_{kind}", job))
    return tasks


def _energy_conservation(made: dict[str, FloatArray], model: BoltzmannGenerator) -> dict[str, Any]:
    """Standard deviation of the total energy per internal degree of freedom, as arXiv 2110.00351 reports it."""
    freedom = 3 * len(model.metadata.particles) - 6

    def per_degree(prefix: str) -> list[float]:
        return [float(energy.std() / freedom) for name, energy in sorted(made.items()) if name.startswith(prefix)]

    flow, force_field = per_degree("nve_flow"), per_degree("nve_force_field")
    return {
        "nve_std_per_dof_kJ_mol": float(np.mean(flow)),
        "nve_std_per_dof_of_each_run_kJ_mol": flow,
        "force_field_nve_std_per_dof_kJ_mol": float(np.mean(force_field)),
        "force_field_nve_std_per_dof_of_each_run_kJ_mol": force_field,
        "ase_nve_std_per_dof_kJ_mol": per_degree("ase_nve")[0],
        "ase_langevin_mean_temperature_K": float(made["ase_langevin"].mean()),
    }


def _langevin_against_samples(
    workflow: Workflow, molecule: MolecularSystem, model: BoltzmannGenerator, tasks: list[_Task]
) -> dict[str, Any]:
    """Jensen-Shannon divergence between long Langevin dynamics and direct samples, over the first two torsions."""
    positions, temperatures = [], []
    for task in tasks:
        if isinstance(task.job, PotentialLangevinRun):
            with np.load(task.job.file, allow_pickle=False) as data:
                positions.append(data["positions"].astype(np.float64))
                temperatures.append(float(data["temperature"].mean()))
    driven = np.concatenate(positions, axis=1)
    settings = workflow.dynamics
    results: dict[str, Any] = {
        "langevin_nanoseconds": settings.langevin_steps * settings.langevin_step_fs * 1e-6 * driven.shape[1],
        "langevin_mean_temperature_K": float(np.mean(temperatures)),
    }
    torsions = list(named_torsions(workflow, molecule, driven).values())[:2]
    if len(torsions) < 2:
        return results
    replicas = driven.shape[1]
    drawn = model.sample_positions(driven.shape[0] * replicas, torch.Generator().manual_seed(workflow.seed))
    sampled = list(named_torsions(workflow, molecule, drawn.positions.numpy()).values())[:2]
    bins = settings.histogram_bins
    # One histogram a replica, which started from a sample of its own, and as many of direct samples.
    p = np.array([torsion_histogram(torsions[0][:, r], torsions[1][:, r], bins) for r in range(replicas)])
    q = np.array([torsion_histogram(sampled[0][r::replicas], sampled[1][r::replicas], bins) for r in range(replicas)])
    results["js_divergence_md_vs_samples"] = jensen_shannon_divergence(p.sum(0), q.sum(0))
    results["js_histogram_bins"] = bins
    if replicas >= MINIMUM_BLOCKS:
        results["js_divergence_expected_from_noise"] = jensen_shannon_noise(p, q).value
    return results


def _engines_against_each_other(file: Path, model: BoltzmannGenerator, held_out: FloatArray) -> dict[str, float]:
    """Largest difference of OpenMM and ASE forces over frames, relative to the largest force of the frame."""
    chosen = held_out[np.linspace(0, len(held_out) - 1, _COMPARED_FRAMES).astype(int)]
    system = particle_system(file)
    add_potential(system, file, dtype=SINGLE_MOLECULE_DTYPE)
    _, openmm_forces = OpenMMEnergy(system, "Reference", workers=1).energies_and_forces(chosen)
    through_ase = ase_forces(file, chosen)
    direct = potential_forces(model, chosen)  # the networks in float32, as trained
    scale = np.abs(direct).max((1, 2))
    return {
        "ase_openmm_max_force_difference": float((np.abs(openmm_forces - through_ase).max((1, 2)) / scale).max()),
        "openmm_direct_max_force_difference": float((np.abs(openmm_forces - direct).max((1, 2)) / scale).max()),
    }
