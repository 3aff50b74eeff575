"""Flow-matching against force matching, and a peptide that folds: ``python -m benchmarks.science.coarse_graining``.

Parts (``--part``): ``alanine``, the error of the free-energy surface of capped alanine against the number of frames, for both
methods with the same student and seeds, and for the histogram of the same frames; ``peptide``, the structure-based model of
chignolin, whose answer is known; ``speed``, microseconds a step. Everything is kept in ``runs/benchmarks/coarse_graining``:
the same command goes on where it stopped, and ``--minutes`` stops it in time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowbridge.core.energy import PotentialEnergy
from flowbridge.core.model_files.files import save
from flowbridge.core.statistics.estimates import effective_sample_percent
from flowbridge.core.statistics.free_energy_surfaces import Surface, SurfaceComparison, compare_surfaces
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.prior_statistics import fit_prior
from flowbridge.forcefields.training.augmented_flow import Proposals, TeacherConfiguration
from flowbridge.forcefields.training.fitting import train_force_field, train_teacher
from flowbridge.integrations.openmm.sampling.dynamics import save_arrays
from flowbridge.integrations.openmm.sampling.torsion_bias import torsion_angles
from flowbridge.workflows.coarse_graining.configuration import CoarseGraining, read_coarse_graining
from flowbridge.workflows.coarse_graining.pipeline import run_coarse_graining
from flowbridge.workflows.coarse_graining.reference import (
    BeadData,
    ReferenceModel,
    load_beads,
    mapped_reference,
    reference_model,
)
from flowbridge.workflows.stages import StageFolder, write_json

from ..harness import OutOfTime, print_table, report, require_time
from ..molecules import EXAMPLES
from .coarse_graining_figures import draw_learning_curves
from .coarse_graining_speed import measure_speed

FOLDER = Path("runs/benchmarks/coarse_graining")
METHODS: dict[str, dict[str, Any]] = {
    "force_matching": {"method": "force_matching"},
    "flow_matching": {"method": "flow_matching", "contrast": 0.0},
    "flow_matching_with_contrast": {"method": "flow_matching", "contrast": 2.0},
}
"""Methods that are compared, by what they change of the training."""
PEPTIDE_METHODS = ("force_matching", "flow_matching")
SIZES = (1_000, 10_000, 100_000)
_PROPOSALS = 200_000
_PROPOSER = TeacherConfiguration(auxiliary=2)
_PROPOSER_STEPS = 4000

SMALL: dict[str, Any] = {
    "workers": 1,
    "sampling": {"runs": 2, "frames": 300, "equilibration_steps": 500, "bias": None},
    "network": {"width": 32, "depth": 2},
    "teacher": {"blocks": 1, "hidden": [16], "stiff": {"couplings": 1, "hidden": [16]}},
    "training": {
        "samples": 1000,
        "log_interval": 20,
        "teacher": {"steps": 40},
        "student": {"steps": 40, "learning_rate": 3e-3},
    },
    "dynamics": {"replicas": 4, "frames": 5, "frame_interval": 10, "equilibration_frames": 1},
}
"""Sizes of seconds, for the tests."""

ALANINE: dict[str, Any] = {
    "sampling": {"runs": 4, "frames": 100_000},
    "network": {"width": 64, "depth": 3},
    "training": {
        "samples": 50_000,
        "compilation": "never",
        "teacher": {"steps": 1500, "learning_rate": 2e-3},
        "student": {"steps": 2500, "batch": 128, "learning_rate": 3e-3},
    },
}
"""Sizes of a minute or two for each training."""


def settings_of(example: str, changes: dict[str, Any]) -> CoarseGraining:
    """Return the settings of an example with tables of ``changes`` on top."""
    plain = read_coarse_graining(EXAMPLES / example).model_dump(mode="json")
    return CoarseGraining.model_validate(_merged(plain, changes))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


class AlanineComparison:
    """The comparison on capped alanine; every piece of work is a stage that is done once."""

    def __init__(self, settings: CoarseGraining, folder: Path, proposals: int) -> None:
        self.settings, self.folder = settings, folder
        self.model: ReferenceModel = reference_model(settings, EXAMPLES)
        self.mapped = mapped_reference(settings, self.model, EXAMPLES, folder)["beads"]
        self.data: BeadData = load_beads(self.mapped)
        self.proposals = proposals
        four = settings.analysis.torsions
        self.torsions = list(four.values())
        self.edges = [np.linspace(-np.pi, np.pi, settings.analysis.bins + 1)] * 2
        self.reference = self.surface(self.data.frames.positions.numpy(), self.data.log_weights)

    def surface(self, positions: NDArray[Any], log_weights: NDArray[np.float64] | None = None) -> Surface:
        """Return the surface on phi and psi of bead positions."""
        values = np.stack([torsion_angles(positions, four) for four in self.torsions], axis=1)
        return Surface.of(values, self.edges, log_weights)

    def frames(self, size: int, fold: int) -> BeadFrames:
        """Return ``size`` equally weighted frames of the runs other than ``fold``, by systematic resampling."""
        ends = np.cumsum(self.data.runs)
        outside = np.ones(len(self.data.frames), dtype=bool)
        outside[ends[fold] - self.data.runs[fold] : ends[fold]] = False
        weights = np.where(outside, np.exp(self.data.log_weights - self.data.log_weights.max()), 0.0)
        cumulative = np.cumsum(weights) / weights.sum()
        points = (np.arange(size) + np.random.default_rng(1000 * fold + 1).random()) / size
        chosen = torch.from_numpy(np.minimum(np.searchsorted(cumulative, points, side="right"), len(weights) - 1))
        forces = self.data.frames.forces
        return BeadFrames(self.data.frames.positions[chosen], None if forces is None else forces[chosen])

    @cached_property
    def proposed(self) -> Proposals:
        """Samples of a flow trained on all frames: what surfaces of force fields are reweighted from."""
        steps = min(_PROPOSER_STEPS, 10 * self.settings.training.teacher.steps)
        inputs = {"beads": self.mapped.digest, "count": self.proposals, "steps": steps, "seed": self.settings.seed}

        def work(folder: Path) -> dict[str, Any]:
            schedule = self.settings.training.teacher.model_copy(update={"steps": steps, "learning_rate": 1e-3})
            flow, _, metadata = train_teacher(
                self.model.mapping.beads, self.data.frames, self.settings.temperature, _PROPOSER,
                self.settings.training.model_copy(update={"teacher": schedule}),
                self.folder / f"proposals-{self.mapped.digest[:12]}", self.settings.seed,
            )  # fmt: skip
            drawn = flow.propose(self.proposals, torch.Generator().manual_seed(77))
            save_arrays(folder / "proposals.npz", positions=drawn.positions.numpy(), log_ratio=drawn.log_ratio.numpy())
            return metadata

        stage = StageFolder.completed(self.folder, "proposals", inputs, work)
        with np.load(stage.folder / "proposals.npz", allow_pickle=False) as kept:
            return Proposals(torch.from_numpy(kept["positions"]), torch.from_numpy(kept["log_ratio"]))

    def cell(self, size: int, fold: int, method: str) -> dict[str, Any]:
        """Return the errors of one training."""
        inputs = {
            "beads": self.mapped.digest, "size": size, "fold": fold, "method": METHODS[method], "proposals": self.proposals,
            "settings": self.settings.model_dump(mode="json", exclude={"output", "dynamics", "sampling", "workers"}),
        }  # fmt: skip

        def work(folder: Path) -> dict[str, Any]:
            frames = self.frames(size, fold)
            training = self.settings.training.model_copy(update=METHODS[method])
            trained = train_force_field(
                self.model.mapping.beads, frames, self.settings.temperature, self.settings.prior, self.settings.network,
                self.settings.teacher, training, folder, self.settings.seed + fold,
            )  # fmt: skip
            save(trained.force_field, folder / "model.flow", provenance=trained.metadata)
            compared, effective = self.evaluated(trained.force_field)
            return {**trained.metadata, **_numbers(compared), "effective_percent_of_evaluation": effective}

        return StageFolder.completed(self.folder, f"cell-{method}-{size}-{fold}", inputs, work).results or {}

    def evaluated(self, force_field: CoarseGrainedForceField) -> tuple[SurfaceComparison, float]:
        """Return a force field's Boltzmann distribution compared with the reference, and the effective sample size in percent.

        Independent samples of the proposal flow under importance weights represent the distribution: no barrier has to be
        crossed, and the error of the evaluation is known.
        """
        drawn = self.proposed
        energies, _ = PotentialEnergy(force_field).energies_and_forces(drawn.positions.numpy())
        log_weights = -energies / thermal_energy(self.settings.temperature) - drawn.log_ratio.numpy()
        surface = self.surface(drawn.positions.numpy(), log_weights)
        return compare_surfaces(surface, self.reference), effective_sample_percent(log_weights)

    def prior(self, size: int, fold: int) -> dict[str, Any]:
        """Return the errors of the prior that is fitted to the same frames, without a network."""
        beads, frames = self.model.mapping.beads, self.frames(size, fold)
        fitted = fit_prior(beads, frames.positions.numpy(), self.settings.temperature, self.settings.prior)
        return _numbers(self.evaluated(CoarseGrainedForceField(beads, self.settings.temperature, fitted, None))[0])

    def histogram(self, size: int, fold: int) -> dict[str, Any]:
        """Return the errors of the histogram of the same frames."""
        return _numbers(compare_surfaces(self.surface(self.frames(size, fold).positions.numpy()), self.reference))


def _numbers(compared: SurfaceComparison) -> dict[str, float]:
    return {
        "mean_square_error": compared.mean_square_error.value,
        "mean_square_error_error": compared.mean_square_error.error,
        "jensen_shannon": compared.divergence.value,
        "bins": compared.bins,
    }


def alanine(folder: Path, sizes: tuple[int, ...], folds: int, small: bool, deadline: float) -> dict[str, Any]:
    """Run what the time allows of the comparison, and return the table."""
    changes = SMALL if small else ALANINE
    comparison = AlanineComparison(settings_of("alanine_coarse.toml", changes), folder, 2000 if small else _PROPOSALS)
    done: dict[str, Any] = {}
    try:
        for fold in range(folds):
            for size in sizes:
                for method in METHODS:
                    require_time(deadline)
                    done[f"{method} {size} {fold}"] = comparison.cell(size, fold, method)
    except OutOfTime:
        print(
            f"out of time after {len(done)} of {folds * len(sizes) * len(METHODS)} trainings: the same command goes on"
        )
    for fold in range(folds):
        for size in sizes:
            done[f"histogram {size} {fold}"] = comparison.histogram(size, fold)
            done[f"prior {size} {fold}"] = comparison.prior(size, fold)
    table = learning_curves(done, sizes, folds)
    draw_learning_curves(table, folder / "alanine_learning_curves.png")
    rows = [
        (f"{name}, {point['frames']:,} frames", f"{point['mean_square_error']:.3f} +- {point['error']:.3f}",
         f"{point['jensen_shannon']:.4f}", str(point["folds"]))
        for name, points in table.items() for point in points
    ]  # fmt: skip
    print_table(
        "capped alanine: error of the free-energy surface", ("", "mean square, kT^2", "JS, nats", "folds"), rows
    )
    return {"cells": done, "curves": table}


def learning_curves(done: dict[str, Any], sizes: tuple[int, ...], folds: int) -> dict[str, list[dict[str, Any]]]:
    """Return means over the folds that are done, and their standard errors."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in (*METHODS, "histogram", "prior"):
        for size in sizes:
            found = [done[key] for fold in range(folds) if (key := f"{name} {size} {fold}") in done]
            if not found:
                continue
            errors = np.array([one["mean_square_error"] for one in found])
            spread = float(errors.std(ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else float("nan")
            divergence = float(np.mean([one["jensen_shannon"] for one in found]))
            curves.setdefault(name, []).append(
                {"frames": size, "mean_square_error": float(errors.mean()), "error": spread, "jensen_shannon": divergence,
                 "folds": len(found)}
            )  # fmt: skip
    return curves


def peptide(folder: Path, small: bool, deadline: float) -> dict[str, Any]:
    """Coarse-grain the structure-based model of chignolin by each method, and return what the workflow reports."""
    results: dict[str, Any] = {}
    for method in PEPTIDE_METHODS:
        require_time(deadline)
        changes: dict[str, Any] = {**SMALL, "sampling": {"runs": 2, "frames": 300}} if small else {}
        settings = settings_of("chignolin_coarse.toml", _merged(changes, {"training": {"method": method}}))
        results[method] = run_coarse_graining(settings, EXAMPLES, folder / method, folder / "reference")
    rows = [
        (method, f"{one['native_contacts_jensen_shannon']:.4f}", f"{one['folding_free_energy_reference_kt']:.3f}",
         f"{one['folding_free_energy_coarse_kt']:.3f} +- {one['folding_free_energy_coarse_error_kt']:.3f}",
         str(one["folding_transitions"]))
        for method, one in results.items()
    ]  # fmt: skip
    columns = ("chignolin", "JS of contacts", "dF reference, kT", "dF coarse, kT", "transitions")
    print_table("structure-based chignolin", columns, rows)
    return results


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the parts that are asked for."""
    deadline = time.monotonic() + 60.0 * options.minutes
    sizes = (200,) if options.small else tuple(options.sizes)
    folds = 1 if options.small else options.folds
    everything = {
        "alanine": lambda: alanine(options.folder / "alanine", sizes, folds, options.small, deadline),
        "peptide": lambda: peptide(options.folder / "peptide", options.small, deadline),
        "speed": lambda: measure_speed(options.folder / "speed", options.small),
    }
    for name in options.part or everything:
        yield name, everything[name]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=("alanine", "peptide", "speed"), help="default: all")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of frames")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long, between two trainings")
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows only that everything works")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "results.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name, work in parts(options):
        try:
            kept[name] = work()
        except OutOfTime:
            print(f"out of time in part {name}: the same command goes on")
        write_json(file, kept)
    if not options.small:
        rows = [(name, "see above and the file") for name in kept]
        report("coarse_graining", "coarse-graining", ("part", ""), rows, kept)


if __name__ == "__main__":
    main()
