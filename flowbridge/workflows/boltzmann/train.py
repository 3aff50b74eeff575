"""The stages train and comparison: train a Boltzmann generator on the frames, then on its own samples."""

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
from ..stages import Done, Stage, StageFolder, Written
from .configuration import Model, Workflow
from .simulate import load_frames


def training_stage(
    workflow: Workflow, model: Model, molecule: MolecularSystem, machines: Machines, name: str, model_file: str
) -> Stage:
    """Return the stage that trains one model; its folder holds ``model.flow``, copied to ``model_file``.

    Under ``torchrun`` the processes train together, each on its share of every batch.
    """

    def work(folder: Path, done: Done) -> dict[str, object]:
        results = _train(workflow, model, molecule, done["simulate"], folder, machines)
        if is_main_process():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the model file has taken over
        return results

    inputs = {"model": json.loads(model.model_dump_json()), "seed": workflow.seed}
    title, what = {
        "train": ("likelihood, then refinement", "the generator"),
        "comparison": ("a second model to compare with", "the generator to compare with"),
    }[name]
    return Stage(
        name, title, work, inputs, ("simulate",), (Written("model.flow", what, model_file),), together=True,
        under="" if name == "train" else name, unlisted=("curves",),
    )  # fmt: skip


def load_generator(trained: StageFolder) -> BoltzmannGenerator:
    """Return the model that a training stage wrote."""
    model = model_files.load(trained.folder / "model.flow")
    if not isinstance(model, BoltzmannGenerator):
        raise TypeError(f"{trained.folder} holds a {type(model).__name__}, not a BoltzmannGenerator")
    return model


def _train(
    workflow: Workflow,
    model: Model,
    molecule: MolecularSystem,
    simulated: StageFolder,
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
