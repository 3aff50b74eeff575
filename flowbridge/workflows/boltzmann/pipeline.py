"""``flowbridge run``: every stage in order, then ``results.json``, the figures and the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.execution.progress import console
from ...core.samples import WeightedSamples
from ...core.training.processes import is_main_process
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines, machines_for
from ..stages import Stage, write_json
from ..summary import print_summary
from . import dynamics as drive
from . import report, reweight, simulate, train, trajectory
from .configuration import Workflow, read_workflow
from .evaluation import force_errors, inside, named_torsions
from .molecular_system import molecular_system
from .targets import checks

if TYPE_CHECKING:
    from distributed import Client

_COMPARISON_SAMPLES = 20_000


def run(
    config_path: Path,
    output: Path | None = None,
    workers: int | None = None,
    scheduler: str | Client | None = None,
) -> dict[str, Any]:
    """Run a workflow file, continuing where an earlier run stopped; return what ``results.json`` holds.

    Under ``torchrun`` the first process does all this, and the others join it where flows are trained and return nothing.

    Args:
        config_path: the TOML file.
        output: folder for the results, instead of the one in the file.
        workers: number of processes, instead of the number in the file; the results do not depend on it.
        scheduler: of a Dask cluster for simulations, energies and samples; see
            :func:`flowbridge.workflows.machines.machines_for`. The results do not depend on it either.
    """
    overrides: dict[str, Any] = {}
    if output is not None:
        overrides["output"] = str(output)
    if workers is not None:
        overrides["workers"] = workers
    workflow = read_workflow(config_path, overrides)
    workflow.output.mkdir(parents=True, exist_ok=True)
    molecule = molecular_system(workflow, config_path.parent)
    say(f"{workflow.molecule.name}: {molecule.system.getNumParticles()} atoms -> {workflow.output}")
    with machines_for(workflow, scheduler) as machines:
        stages = _stages(workflow, molecule, config_path.parent, machines)
        if not is_main_process():
            return {}
        results = _results(workflow, molecule, stages, config_path.parent, machines)
    _publish(workflow, stages)
    write_json(workflow.output / "results.json", results)
    reference = read_reference(workflow, config_path.parent)
    report.write(workflow, molecule, stages, results, workflow.output, reference, workflow.targets)
    torsion = workflow.reweight.free_energy.torsion if workflow.reweight.free_energy else None
    print_summary(results, checks(results, torsion, workflow.targets), workflow.output)
    return results


def say(text: str) -> None:
    """Print a headline to the terminal's error stream, where the progress bars are."""
    if is_main_process():
        console.print(f"[bold]{text}[/bold]")


def training_data(workflow: Workflow, molecule: MolecularSystem, folder: Path, machines: Machines) -> Stage:
    """Return the stage whose frames the models are trained on: simulated, or read from trajectories."""
    if workflow.trajectory is None:
        say("1 simulate")
        return simulate.run(workflow, molecule, workflow.output, machines.executor)
    say("1 read trajectories")
    return trajectory.run(workflow, workflow.trajectory, molecule, folder, workflow.output, machines)


def _stages(workflow: Workflow, molecule: MolecularSystem, folder: Path, machines: Machines) -> dict[str, Stage]:
    stages = {"simulate": training_data(workflow, molecule, folder, machines)}
    say("2 train")
    stages["train"] = train.run(
        workflow, workflow.model, molecule, stages["simulate"], workflow.output, "train", machines
    )
    if workflow.comparison is not None:
        say("2b train the model to compare with")
        stages["comparison"] = train.run(
            workflow, workflow.comparison, molecule, stages["simulate"], workflow.output, "comparison", machines
        )
    if not is_main_process():
        return stages
    say("3 drive")
    stages["drive"] = drive.run(workflow, molecule, stages["simulate"], stages["train"], workflow.output)
    say("4 reweight")
    stages["reweight"] = reweight.run(workflow, molecule, stages["train"], workflow.output, machines)
    return stages


def _results(
    workflow: Workflow, molecule: MolecularSystem, stages: dict[str, Stage], folder: Path, machines: Machines
) -> dict[str, Any]:
    done = {name: stage.results or {} for name, stage in stages.items()}
    seconds = {name: result["wall_seconds"] for name, result in done.items()}
    results: dict[str, Any] = {"molecule": workflow.molecule.name, "seed": workflow.seed}
    skipped = {"wall_seconds", "profile", "curves"}
    for name in ("simulate", "train", "drive", "reweight"):
        results.update({key: value for key, value in done[name].items() if key not in skipped})
    results["amber_nve_std_per_dof_kJ_mol"] = results["force_field_nve_std_per_dof_kJ_mol"]
    difference = workflow.reweight.free_energy
    if difference is not None:
        name = difference.torsion
        frames = simulate.load_frames(stages["simulate"]).training
        member = inside(named_torsions(workflow, molecule, frames.positions)[name], difference)
        results[f"training_delta_f_{name}_kT"] = float(-np.log(member.mean() / (~member).mean()))
        reference = read_reference(workflow, folder)
        if reference is not None:
            results[f"reference_delta_f_{name}_kT"] = reference["delta_f_kT"]
            results[f"reference_delta_f_{name}_error_kT"] = reference["delta_f_error_kT"]
    if "comparison" in stages:
        results["comparison"] = _comparison(workflow, molecule, stages, machines)
    results["wall_seconds"] = {**seconds, "total": sum(seconds.values())}
    return results


def read_reference(workflow: Workflow, folder: Path) -> dict[str, Any] | None:
    """Return the stored reference of a workflow; None where it names none or has none yet."""
    if workflow.reference is None or not (folder / workflow.reference.file).is_file():
        return None
    loaded: dict[str, Any] = json.loads((folder / workflow.reference.file).read_text())
    return loaded


def _comparison(
    workflow: Workflow, molecule: MolecularSystem, stages: dict[str, Stage], machines: Machines
) -> dict[str, Any]:
    """The second model by the same yardsticks, on fewer samples."""
    stage = stages["comparison"]
    model = drive.load_generator(stage)
    samples = model.sample(_COMPARISON_SAMPLES, machines.energy_here(molecule), seed=workflow.seed)
    frames = simulate.load_frames(stages["simulate"]).held_out
    done = stage.results or {}
    return {
        "samples": _COMPARISON_SAMPLES,
        "ess_percent": samples.effective_sample_percent(),
        **force_errors(model, frames, workflow.molecule.temperature),
        "parameters": done["parameters"],
        "wall_seconds": done["wall_seconds"],
    }


def _publish(workflow: Workflow, stages: dict[str, Stage]) -> None:
    """Copy what a user takes away to the top of the output folder."""
    name = re.sub(r"\W+", "_", workflow.molecule.name).strip("_").lower()
    shutil.copyfile(stages["train"].folder / "model.flow", workflow.output / f"{name}.flow")
    if "comparison" in stages:
        shutil.copyfile(stages["comparison"].folder / "model.flow", workflow.output / f"{name}_comparison.flow")
    samples = WeightedSamples.load(reweight.sample_file(stages["reweight"]))
    samples.save(workflow.output / "samples.h5", single_precision=True)
