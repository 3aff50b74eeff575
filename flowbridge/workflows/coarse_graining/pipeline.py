"""``flowbridge coarse-grain``: from a molecule to a coarse-grained force field, its simulation, and how good it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...core.compilation.building import accelerated
from ...core.compilation.programs import resolved
from ...core.errors import ConfigurationError
from ...core.execution.progress import console, track
from ...core.model_files.files import load, save
from ...forcefields.batched_dynamics import LangevinReplicas
from ...forcefields.coarse_grained_force_field import CoarseGrainedForceField
from ...forcefields.parallel_tempering import ParallelTempering
from ...forcefields.training.fitting import train_force_field
from ...forcefields.training.modules import drawn
from ...integrations.mdtraj.bead_selections import write_bead_pdb
from ...integrations.openmm.sampling.dynamics import save_arrays
from ..stages import Stage, write_json
from .analysis import analyse
from .configuration import CoarseGraining, read_coarse_graining
from .figures import draw_figures
from .reference import BeadData, ReferenceModel, load_beads, reference_model, run_mapping, run_reference
from .report import write_report

_CHUNK = 10  # frames between saved states of dynamics


def run(path: Path, output: Path | None = None, workers: int | None = None) -> dict[str, Any]:
    """Run, or continue, everything that a TOML file asks for, and return what ``results.json`` holds."""
    overrides = {} if workers is None else {"workers": workers}
    settings = read_coarse_graining(path, overrides)
    return run_settings(settings, path.parent, output or settings.output)


def run_settings(
    settings: CoarseGraining, folder: Path, target: Path, reference_folder: Path | None = None
) -> dict[str, Any]:
    """Run, or continue, everything that settings ask for.

    Args:
        settings: what to do.
        folder: where relative paths of the settings start.
        target: where results go.
        reference_folder: where the stages of the reference are kept; ``target`` where None. Runs that share a reference share
            this.
    """
    target.mkdir(parents=True, exist_ok=True)
    model = reference_model(settings, folder)
    beads = model.mapping.beads
    _say(f"{settings.name}: {len(model.particles)} particles, {len(beads)} beads -> {target}")
    _say("1 reference")
    reference = run_reference(settings, model, folder, reference_folder or target)
    _say("2 beads")
    mapped = run_mapping(settings, model, reference, reference_folder or target)
    data = load_beads(mapped)
    _say(f"3 train ({settings.training.method.replace('_', ' ')})")
    trained = run_training(settings, model, mapped, data, target)
    _say("4 dynamics")
    simulated = run_dynamics(settings, trained, mapped, data, target)
    _say("5 analysis")
    results = _finish(settings, model, folder, target, (reference, mapped, trained, simulated), data)
    _print(results, target)
    return results


def run_training(settings: CoarseGraining, model: ReferenceModel, mapped: Stage, data: BeadData, output: Path) -> Stage:
    """Train the force field and return the stage, with ``model.flow``."""
    sections = ("prior", "network", "teacher", "training")
    inputs = {
        "beads": mapped.digest,
        "seed": settings.seed,
        "temperature": settings.temperature,
        "settings": {name: json.loads(getattr(settings, name).model_dump_json()) for name in sections},
    }

    def work(folder: Path) -> dict[str, Any]:
        result = train_force_field(
            model.mapping.beads, data.frames, settings.temperature, settings.prior, settings.network, settings.teacher,
            settings.training, folder, settings.seed, show_progress=console.is_terminal,
        )  # fmt: skip
        save(result.force_field, folder / "model.flow", provenance={"name": settings.name, **result.metadata})
        return {**result.metadata, "curves": result.curves}

    return Stage.completed(output, "train", inputs, work)


def run_dynamics(settings: CoarseGraining, trained: Stage, mapped: Stage, data: BeadData, output: Path) -> Stage:
    """Simulate the force field and return the stage, with ``frames.npz``: ``(frames, replicas, n, 3)``."""
    inputs = {
        "train": trained.digest,
        "dynamics": json.loads(settings.dynamics.model_dump_json()),
        "seed": settings.seed,
    }
    return Stage.completed(output, "dynamics", inputs, lambda folder: _simulate(settings, trained, data, folder))


def _simulate(settings: CoarseGraining, trained: Stage, data: BeadData, folder: Path) -> dict[str, Any]:
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


def _finish(
    settings: CoarseGraining,
    model: ReferenceModel,
    folder: Path,
    output: Path,
    stages: tuple[Stage, ...],
    data: BeadData,
) -> dict[str, Any]:
    """Compare, draw, write the report and put the results where users look."""
    _, _, trained, simulated = stages
    with np.load(simulated.folder / "frames.npz", allow_pickle=False) as stored:
        frames = stored["positions"]
    found = analyse(settings, model, folder, data, frames)
    results: dict[str, Any] = {"name": settings.name, "seed": settings.seed, "temperature": settings.temperature}
    for stage in stages:
        results.update(
            {key: value for key, value in (stage.results or {}).items() if key not in ("wall_seconds", "curves")}
        )
    results |= found.numbers
    results["wall_seconds"] = {stage.name: (stage.results or {})["wall_seconds"] for stage in stages}
    shutil.copyfile(trained.folder / "model.flow", output / "model.flow")
    write_bead_pdb(model.mapping.beads, frames[-1, 0], output / "beads.pdb")
    write_json(output / "results.json", results)
    figures = draw_figures(found, trained.results or {}, output / "figures")
    write_report(results, figures, output / "report.html")
    return results


def load_force_field(stage: Stage) -> CoarseGrainedForceField:
    """Return the force field that :func:`run_training` kept."""
    model = load(stage.folder / "model.flow")
    if not isinstance(model, CoarseGrainedForceField):
        raise ConfigurationError(f"{stage.folder / 'model.flow'} is no coarse-grained force field")
    return model


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _print(results: dict[str, Any], output: Path) -> None:
    shown = Console()
    table = Table(title=f"{results['name']}: results.json", title_justify="left")
    table.add_column("key", overflow="fold")
    table.add_column("value", justify="right")
    for key, value in results.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(key, f"{value:.5g}" if isinstance(value, float) else str(value))
        elif isinstance(value, str) and key != "name":
            table.add_row(key, value)
    for stage, seconds in results["wall_seconds"].items():
        table.add_row(f"wall_seconds.{stage}", f"{seconds:.1f}")
    shown.print(table)
    for name, what in (
        ("model.flow", "the force field"),
        ("beads.pdb", "a structure to start from"),
        ("report.html", "all of it"),
    ):
        shown.print(f"{output / name}: {what}", soft_wrap=True)
