"""Stage 2: train a Boltzmann generator on the frames, then on its own samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ...core.execution.progress import console
from ...core.model_files import files as model_files
from ...core.training.processes import is_main_process
from ...flows.boltzmann.generator import BoltzmannGenerator
from ...flows.boltzmann.training.fitting import TrainingData, train
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines
from ..stages import Stage
from .configuration import Model, Workflow
from .simulate import load_frames


def run(
    workflow: Workflow,
    model: Model,
    molecule: MolecularSystem,
    simulated: Stage,
    output: Path,
    name: str,
    machines: Machines,
) -> Stage:
    """Run (or continue) the training of one model and return the stage; its folder holds ``model.flow``.

    Under ``torchrun`` its processes train together, each on its share of every batch.
    """
    inputs = {
        "simulate": simulated.digest,
        "model": json.loads(model.model_dump_json()),
        "seed": workflow.seed,
    }
    stage = Stage.completed_together(
        output, name, inputs, lambda folder: _train(workflow, model, molecule, simulated, folder, machines)
    )
    if is_main_process():
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)  # the model file has taken over
    return stage


def _train(
    workflow: Workflow,
    model: Model,
    molecule: MolecularSystem,
    simulated: Stage,
    folder: Path,
    machines: Machines,
) -> dict[str, object]:
    kept = load_frames(simulated)
    frames = kept.training
    particles = particles_from_topology(molecule.topology, molecule.system)
    generator = BoltzmannGenerator.untrained(particles, workflow.molecule.temperature, frames.positions, model.flow)
    data = TrainingData(*(torch.as_tensor(part) for part in (frames.positions, frames.energies, frames.forces)))
    energy = machines.energy_here(molecule)
    result = train(
        generator, data, energy, model.training, folder / "checkpoints", workflow.seed,
        show_progress=console.is_terminal and is_main_process(), held_out=torch.as_tensor(kept.held_out.positions),
    )  # fmt: skip
    if not is_main_process():
        return {}
    digest = model_files.save(
        generator,
        folder / "model.flow",
        provenance={"molecule": workflow.molecule.name, "seed": workflow.seed, "stage": folder.name},
    )
    return {
        **result.to_dict(),
        "model_digest": digest,
        "parameters": sum(p.numel() for p in generator.parameters()),
        "circular_torsions": len(generator.coordinates.layout.circular),
    }
