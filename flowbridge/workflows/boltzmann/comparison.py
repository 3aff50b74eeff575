"""The stage compare: the second model by the same measures as the first, on fewer samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines
from ..stages import Done, Stage
from .configuration import Workflow
from .evaluation import force_errors
from .simulate import load_frames
from .train import load_generator

_SAMPLES = 20_000


def comparison_stage(workflow: Workflow, molecule: MolecularSystem, machines: Machines) -> Stage:
    """Return the stage that evaluates the model of the stage ``comparison``."""

    def work(folder: Path, done: Done) -> dict[str, Any]:
        model = load_generator(done["comparison"])
        samples = model.sample(_SAMPLES, machines.energy_here(molecule), seed=workflow.seed)
        return {
            "samples": _SAMPLES,
            "ess_percent": samples.effective_sample_percent(),
            **force_errors(model, load_frames(done["simulate"]).held_out, workflow.molecule.temperature),
        }

    title = "the second model by the same measures"
    return Stage("compare", title, work, {"samples": _SAMPLES}, needs=("comparison",), under="comparison")
