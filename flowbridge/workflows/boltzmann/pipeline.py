"""``flowbridge run`` and ``flowbridge train``: from a molecule to a Boltzmann generator, its samples and its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines, machines_for
from ..report import Check
from ..runner import Pipeline, Selection, run_pipeline
from ..stages import Stage, read_json
from .averages import averages_stage
from .comparison import comparison_stage
from .configuration import Workflow, read_workflow
from .dynamics import dynamics_stage
from .molecular_system import molecular_system
from .report import report_page
from .requirements import checks
from .reweight import reweighting_stage
from .simulate import simulation_stage
from .train import training_stage
from .trajectory import trajectory_stage

if TYPE_CHECKING:
    from distributed import Client


def run_workflow_file(
    config_path: Path,
    output: Path | None = None,
    workers: int | None = None,
    scheduler: str | Client | None = None,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Run a workflow file, continuing where an earlier run stopped; return what ``results.json`` holds.

    Under ``torchrun`` the first process does all this, and the others join it where flows are trained and return nothing.

    Args:
        config_path: the TOML file.
        output: folder for the results, instead of the one in the file.
        workers: number of processes, instead of the number in the file; the results do not depend on it.
        scheduler: of a Dask cluster for simulations, energies and samples; see
            :func:`flowbridge.workflows.machines.machines_for`. The results do not depend on it either.
        selection: stages that are asked for; all by default.
    """
    overrides: dict[str, Any] = {}
    if output is not None:
        overrides["output"] = str(output)
    if workers is not None:
        overrides["workers"] = workers
    return run_workflow(read_workflow(config_path, overrides), config_path.parent, scheduler, selection)


def run_workflow(
    workflow: Workflow,
    folder: Path,
    scheduler: str | Client | None = None,
    selection: Selection | None = None,
    *,
    dynamics: bool = True,
) -> dict[str, Any]:
    """Run a workflow; relative paths start at ``folder``. Without ``dynamics`` the stage of that name does not exist."""
    molecule = molecular_system(workflow, folder)
    with machines_for(workflow.workers, scheduler) as machines:
        return run_pipeline(boltzmann_pipeline(workflow, molecule, folder, machines, dynamics=dynamics), selection)


def boltzmann_pipeline(
    workflow: Workflow, molecule: MolecularSystem, folder: Path, machines: Machines, *, dynamics: bool = True
) -> Pipeline:
    """Return the stages of a workflow, and what is made of their results."""
    reference = _stored_reference(workflow, folder)
    second = workflow.comparison if dynamics else None
    if workflow.trajectory is None:
        data = simulation_stage(workflow, molecule, machines.executor)
    else:
        data = trajectory_stage(workflow, workflow.trajectory, molecule, folder, machines)
    name = re.sub(r"\W+", "_", workflow.molecule.name).strip("_").lower()
    model_file = f"{name}.flow" if dynamics else "model.flow"
    stages: list[Stage] = [data, training_stage(workflow, workflow.model, molecule, machines, "train", model_file)]
    if second is not None:
        other = f"{name}_comparison.flow"
        stages.append(training_stage(workflow, second, molecule, machines, "comparison", other))
    stages += [
        reweighting_stage(workflow, molecule, machines),
        averages_stage(workflow, molecule, reference),
    ]
    if dynamics:
        stages.append(dynamics_stage(workflow, molecule))
    if second is not None:
        stages.append(comparison_stage(workflow, molecule, machines))
    difference = workflow.reweight.free_energy

    def measured(results: Mapping[str, Any]) -> Sequence[Check]:
        return checks(results, None if difference is None else difference.torsion, workflow.targets)

    return Pipeline(
        kind="boltzmann",
        title=f"{workflow.molecule.name}, {molecule.system.getNumParticles()} atoms",
        output=workflow.output,
        stages=tuple(stages),
        goal="reweight",
        headline={"molecule": workflow.molecule.name, "seed": workflow.seed},
        page=lambda outcome: report_page(workflow, molecule, outcome, model_file, reference),
        checks=measured,
    )


def _stored_reference(workflow: Workflow, folder: Path) -> dict[str, Any] | None:
    """Return the reference free energy that ``flowbridge reference`` stored; None where there is none (yet)."""
    return None if workflow.reference is None else read_json(folder / workflow.reference.file)
