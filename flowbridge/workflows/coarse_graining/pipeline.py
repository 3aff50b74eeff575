"""``flowbridge coarse-grain``: from a molecule to a coarse-grained force field, its simulation, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.execution.progress import console
from ...core.model_files.files import save
from ...forcefields.training.fitting import train_force_field
from ..report import Figure, Page
from ..runner import Outcome, Pipeline, Selection, run_pipeline
from ..stages import Done, Stage, Written
from .analysis import analysis_stage
from .configuration import CoarseGraining, read_coarse_graining
from .dynamics import dynamics_stage
from .figures import CAPTIONS
from .reference import ReferenceModel, beads_stage, load_beads, reference_model, reference_stage

_USE = """from flowbridge.integrations.openmm import add_potential, particle_system

system = particle_system("model.flow")
add_potential(system, "model.flow")"""


def run_coarse_graining_file(
    path: Path, output: Path | None = None, workers: int | None = None, selection: Selection | None = None
) -> dict[str, Any]:
    """Run, or continue, everything that a TOML file asks for, and return what ``results.json`` holds."""
    settings = read_coarse_graining(path, {} if workers is None else {"workers": workers})
    return run_coarse_graining(settings, path.parent, output or settings.output, selection=selection)


def run_coarse_graining(
    settings: CoarseGraining,
    folder: Path,
    output: Path,
    reference_folder: Path | None = None,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Run, or continue, everything that settings ask for, and return what ``results.json`` holds.

    Args:
        settings: what to do.
        folder: where relative paths of the settings start.
        output: folder for the results.
        reference_folder: where the stages of the reference are kept; ``output`` where None. Runs that share a reference share
            this.
        selection: stages that are asked for; all by default.
    """
    model = reference_model(settings, folder)
    pipeline = Pipeline(
        kind="coarse-graining",
        title=f"{settings.name}, {len(model.particles)} particles, {len(model.mapping.beads)} beads",
        output=output,
        stages=(
            reference_stage(settings, model, folder, reference_folder),
            beads_stage(settings, model, reference_folder),
            training_stage(settings, model),
            dynamics_stage(settings, model),
            analysis_stage(settings, model, folder),
        ),
        goal="dynamics",
        headline={"name": settings.name, "seed": settings.seed, "temperature": settings.temperature},
        page=lambda outcome: _page(settings, outcome),
    )
    return run_pipeline(pipeline, selection)


def training_stage(settings: CoarseGraining, model: ReferenceModel) -> Stage:
    """Return the stage that trains the force field; its folder holds ``model.flow``."""

    def work(folder: Path, done: Done) -> dict[str, Any]:
        result = train_force_field(
            model.mapping.beads, load_beads(done["beads"]).frames, settings.temperature, settings.prior, settings.network,
            settings.teacher, settings.training, folder, settings.seed, show_progress=console.is_terminal,
        )  # fmt: skip
        save(result.force_field, folder / "model.flow", provenance={"name": settings.name, **result.metadata})
        return {**result.metadata, "curves": result.curves}

    tables = ("prior", "network", "teacher", "training")
    inputs = {
        "seed": settings.seed,
        "temperature": settings.temperature,
        "settings": {name: json.loads(getattr(settings, name).model_dump_json()) for name in tables},
    }
    title = f"the force field, by {settings.training.method.replace('_', ' ')}"
    return Stage(
        "train", title, work, inputs, ("beads",), (Written("model.flow", "the force field"),), unlisted=("curves",)
    )


def _page(settings: CoarseGraining, outcome: Outcome) -> Page:
    figures = []
    if "analysis" in outcome.done:
        drawn = outcome.done["analysis"].folder / "figures"
        files = {name: drawn / f"{name}.png" for name in CAPTIONS}
        figures = [Figure(*CAPTIONS[name], file) for name, file in files.items() if file.is_file()]
    lead = (
        f"A coarse-grained force field at {settings.temperature:g} K, trained by "
        f"{settings.training.method.replace('_', ' ')} on frames of a reference."
    )
    use = (_USE, "flowbridge md model.flow --structure beads.pdb --step-fs 2")
    return Page(settings.name, lead, figures, use=use)
