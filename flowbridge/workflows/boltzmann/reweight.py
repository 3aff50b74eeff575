"""The stage reweight: samples of the flow, their weights, and what they say about the true ensemble."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.execution.progress import track
from ...core.samples import WeightedSamples
from ...core.statistics.estimates import free_energy_difference, free_energy_profile, largest_weight_ratio
from ...core.training.streams import stream_seed
from ...flows.boltzmann.generator import BoltzmannGenerator
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..machines import Machines
from ..stages import Done, Row, Stage, StageFolder, Written, numbers
from .configuration import Workflow
from .evaluation import inside, named_torsions
from .train import load_generator

_PROFILE_BINS = 72


def reweighting_stage(workflow: Workflow, molecule: MolecularSystem, machines: Machines) -> Stage:
    """Return the stage that draws and weighs samples; its folder holds one HDF5 file for each set."""

    def work(folder: Path, done: Done) -> dict[str, Any]:
        sets = _draw(workflow, molecule, load_generator(done["train"]), folder, machines)
        sets[0].save(folder / "samples.h5", single_precision=True)
        return _analyse(workflow, molecule, sets)

    inputs = {"reweight": json.loads(workflow.reweight.model_dump_json()), "seed": workflow.seed}
    return Stage(
        "reweight", "samples and their weights", work, inputs, ("train",), (Written("samples.h5", "weighted samples"),),
        _summary, unlisted=("profile",),
    )  # fmt: skip


def _summary(results: Mapping[str, Any]) -> Iterator[Row]:
    yield from numbers(results)
    percents = ", ".join(f"{percent:.1f} %" for percent in results["ess_percent_of_each_set"])
    yield Row("effective sample size of each set", percents)


def sample_file(stage: StageFolder, number: int = 0) -> Path:
    """Return the file of one set of samples."""
    return stage.folder / f"samples_{number}.h5"


def _draw(
    workflow: Workflow, molecule: MolecularSystem, model: BoltzmannGenerator, folder: Path, machines: Machines
) -> list[WeightedSamples]:
    energy = machines.energy(molecule)
    sets = []
    for number in track(
        range(workflow.reweight.independent_sets), "weighted samples", workflow.reweight.independent_sets
    ):
        file = folder / f"samples_{number}.h5"
        if not file.is_file():
            seed = stream_seed(workflow.seed, number)
            model.sample(workflow.reweight.samples, energy, seed=seed, executor=machines.cluster).save(file)
        sets.append(WeightedSamples.load(file))
    return sets


def _analyse(workflow: Workflow, molecule: MolecularSystem, sets: list[WeightedSamples]) -> dict[str, Any]:
    results: dict[str, Any] = {
        "samples": len(sets[0]),
        "ess_percent": sets[0].effective_sample_percent(),
        "ess_percent_of_each_set": [one.effective_sample_percent() for one in sets],
        "largest_weight_ratio_of_each_set": [largest_weight_ratio(one.log_weights) for one in sets],
        "samples_without_finite_energy": [int(np.isneginf(one.log_weights).sum()) for one in sets],
        "log_normaliser_of_each_set": [_log_normaliser(one) for one in sets],
    }
    difference = workflow.reweight.free_energy
    if difference is None:
        return results
    angles = [named_torsions(workflow, molecule, one.positions)[difference.torsion] for one in sets]
    estimates = []
    for one, torsion in zip(sets, angles, strict=True):
        member = inside(torsion, difference)
        estimates.append(free_energy_difference(~member, member, one.log_weights, replicas=workflow.reweight.bootstrap))
    # Sets are draws from the same density, so their weights share one constant and may be pooled.
    torsion, log_weights = np.concatenate(angles), np.concatenate([one.log_weights for one in sets])
    member = inside(torsion, difference)
    pooled = free_energy_difference(~member, member, log_weights, replicas=workflow.reweight.bootstrap)
    profile = free_energy_profile(torsion, log_weights, _PROFILE_BINS, 360.0, replicas=workflow.reweight.bootstrap)
    name = difference.torsion
    return {
        **results,
        f"delta_f_{name}_kT": pooled.value,
        f"delta_f_{name}_error_kT": pooled.error,
        f"delta_f_{name}_of_each_set_kT": [[e.value, e.error] for e in estimates],
        f"unweighted_delta_f_{name}_kT": float(-np.log(member.mean() / (~member).mean())),
        "profile": {
            "torsion": name,
            "edges_degrees": profile.edges.tolist(),
            "free_energy_kT": [float(x) if np.isfinite(x) else None for x in profile.free_energy],
            "error_kT": [float(x) if np.isfinite(x) else None for x in profile.error],
        },
    }


def _log_normaliser(samples: WeightedSamples) -> float:
    return float(np.logaddexp.reduce(samples.log_weights) - np.log(len(samples)))
