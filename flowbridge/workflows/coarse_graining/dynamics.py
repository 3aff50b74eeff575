"""The stage dynamics: simulation of the coarse-grained force field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.compilation.building import accelerated
from ...core.compilation.programs import resolved
from ...core.errors import ConfigurationError
from ...core.execution.progress import track
from ...forcefields.batched_dynamics import LangevinReplicas
from ...forcefields.coarse_grained_force_field import CoarseGrainedForceField
from ...forcefields.parallel_tempering import ParallelTempering
from ...forcefields.training.modules import drawn
from ...integrations.mdtraj.bead_selections import write_bead_pdb
from ...integrations.openmm.sampling.dynamics import save_arrays
from ..stages import Done, Stage, StageFolder, Written
from .configuration import CoarseGraining
from .reference import BeadData, ReferenceModel, load_beads

_CHUNK = 10  # frames between saved states of dynamics


def dynamics_stage(settings: CoarseGraining, model: ReferenceModel) -> Stage:
    """Return the stage that simulates the force field; its folder holds ``frames.npz``: ``(frames, replicas, n, 3)`` nm."""

    def work(folder: Path, done: Done) -> dict[str, Any]:
        results = _simulate(settings, done["train"], load_beads(done["beads"]), folder)
        with np.load(folder / "frames.npz", allow_pickle=False) as stored:
            write_bead_pdb(model.mapping.beads, stored["positions"][-1, 0], folder / "beads.pdb")
        return results

    inputs = {"dynamics": json.loads(settings.dynamics.model_dump_json()), "seed": settings.seed}
    written = (Written("beads.pdb", "a structure to start from"),)
    return Stage("dynamics", "simulation of the force field", work, inputs, ("train",), written)


def _simulate(settings: CoarseGraining, trained: StageFolder, data: BeadData, folder: Path) -> dict[str, Any]:
    dynamics = settings.dynamics
    model = CoarseGrainedForceField.load(trained.folder / "model.flow").requires_grad_(False)
    temperatures = dynamics.temperatures or (settings.temperature,)
    if abs(temperatures[0] - settings.temperature) > 1e-6:
        raise ConfigurationError(
            f"the first of [dynamics] temperatures is {temperatures[0]:g} K, but the force field is of "
            f"{settings.temperature:g} K"
        )
    start = starts(data, dynamics.replicas, settings.seed)
    mode = resolved("auto")
    batch = dynamics.replicas * len(temperatures)
    potential = model if mode == "never" else accelerated(model, mode=mode, batch=min(batch, 64))
    ladder = ParallelTempering(
        potential, start, temperatures, step_ps=dynamics.step_fs / 1000.0, exchange_interval=dynamics.exchange_interval,
        friction_per_ps=dynamics.friction_per_ps, seed=settings.seed, last_good=folder / "last_good.npz",
    )  # fmt: skip
    frames = run_in_pieces(ladder, dynamics.equilibration_frames + dynamics.frames, dynamics.frame_interval, folder)
    save_arrays(folder / "frames.npz", positions=frames[dynamics.equilibration_frames :].astype(np.float64))
    steps = (dynamics.equilibration_frames + dynamics.frames) * dynamics.frame_interval
    return {
        "replicas": dynamics.replicas,
        "temperatures": list(temperatures),
        "nanoseconds_at_lowest": steps * dynamics.replicas * dynamics.step_fs * 1e-6,
        "exchange_acceptance": [float(value) for value in ladder.acceptance],
    }


def starts(data: BeadData, replicas: int, seed: int) -> Tensor:
    """Return positions ``(R, n, 3)`` drawn from the reference frames by their weights."""
    weights = data.frames.weights
    chosen = drawn(len(data.frames), weights, replicas, torch.Generator().manual_seed(seed))
    return data.frames.positions[chosen].double()


def run_in_pieces(
    simulation: ParallelTempering | LangevinReplicas, frames: int, interval: int, folder: Path
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Run with a state and frames saved every few frames; continue from those of an interrupted run, to the same numbers."""
    parts = []
    pieces = [min(_CHUNK, frames - done) for done in range(0, frames, _CHUNK)]
    for number, count in enumerate(track(iter(pieces), "coarse-grained dynamics", len(pieces))):
        file = folder / "pieces" / f"{number:05d}.npz"
        if not file.is_file():
            if number:
                with np.load(folder / "pieces" / f"{number - 1:05d}.npz", allow_pickle=False) as before:
                    simulation.load_state_dict({name: before[name] for name in before if name != "frames"})
            kept = simulation.run(count, interval)
            save_arrays(file, frames=kept, **simulation.state_dict())
        with np.load(file, allow_pickle=False) as stored:
            parts.append(stored["frames"])
            if number == len(pieces) - 1:
                simulation.load_state_dict({name: stored[name] for name in stored if name != "frames"})
    return np.concatenate(parts)
