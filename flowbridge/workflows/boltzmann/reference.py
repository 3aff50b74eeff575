"""The reference free energy of a workflow: computed by ``flowbridge reference``, stored next to its TOML."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigurationError
from ...core.execution.executors import ProcessExecutor
from ...core.execution.progress import track
from ...core.units import thermal_energy
from ...integrations.openmm.sampling.dynamics import save_arrays
from ...integrations.openmm.sampling.torsion_bias import BiasedRun, MetadynamicsRun, build_bias, run_biased
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..stages import StageFolder, write_json
from .configuration import FreeEnergyDifference, Reference, Workflow, read_workflow
from .molecular_system import molecular_system

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_PROFILE_BINS = 72


def compute_reference(config_path: Path, workers: int | None = None) -> dict[str, Any]:
    """Compute the reference of ``config_path`` and write it to the file named there; return what was written.

    Finished runs are kept under the workflow's output, and are not repeated for the same settings.

    Raises:
        ConfigurationError: when the workflow has no ``[reference]`` or no free energy to compute.
    """
    workflow = read_workflow(config_path)
    reference, difference = workflow.reference, workflow.reweight.free_energy
    if reference is None or difference is None:
        raise ConfigurationError(f"{config_path} needs [reference] and [reweight.free_energy] for a reference")
    if difference.torsion not in reference.torsions or not 1 <= len(reference.torsions) <= 2:
        raise ConfigurationError("[reference] torsions: give one or two names, among them that of the free energy")
    molecule = molecular_system(workflow, config_path.parent)
    processes = ProcessExecutor(workers or workflow.workers)

    def work(folder: Path) -> dict[str, Any]:
        bias = _bias(workflow, reference, molecule, folder, processes)
        return _analyse(
            workflow, reference, difference, _production(workflow, reference, molecule, bias, folder, processes)
        )

    inputs = {
        "system": molecule.system_xml,
        "positions": molecule.positions.tolist(),
        "temperature": workflow.molecule.temperature,
        "torsions": {
            name: list(molecule.torsion_atoms(workflow.molecule.torsions[name])) for name in reference.torsions
        },
        "reference": json.loads(reference.model_dump_json(exclude={"file"})),
        "free_energy": json.loads(difference.model_dump_json()),
        "seed": workflow.seed,
    }
    result = dict(StageFolder.completed(workflow.output, "reference", inputs, work).results or {})
    del result["wall_seconds"]
    write_json(config_path.parent / reference.file, result)
    return result


def _bias(
    workflow: Workflow, reference: Reference, molecule: MolecularSystem, folder: Path, processes: ProcessExecutor
) -> FloatArray:
    file = folder / "bias.npz"
    if not file.is_file():
        torsions = tuple(molecule.torsion_atoms(workflow.molecule.torsions[name]) for name in reference.torsions)
        runs = [
            MetadynamicsRun(
                molecule.system_xml, molecule.positions, torsions, workflow.molecule.temperature,
                reference.step_fs / 1000.0, reference.friction_per_ps, reference.bias_factor, reference.bias_steps,
                workflow.seed + index, folder / "hills",
            )
            for index in range(reference.bias_runs)
        ]  # fmt: skip
        made = list(track(processes(build_bias, runs), "metadynamics", len(runs)))
        save_arrays(file, bias=made[-1])  # the run that ended last has read the hills of the others
    with np.load(file, allow_pickle=False) as data:
        return np.asarray(data["bias"])


def _production(
    workflow: Workflow,
    reference: Reference,
    molecule: MolecularSystem,
    bias: FloatArray,
    folder: Path,
    processes: ProcessExecutor,
) -> list[Path]:
    torsions = tuple(molecule.torsion_atoms(workflow.molecule.torsions[name]) for name in reference.torsions)
    generator = np.random.default_rng(workflow.seed)
    runs = []
    for index in range(reference.starts):
        # Starts spread over the first torsion, uniform at random in the others.
        start = generator.uniform(-math.pi, math.pi, len(torsions))
        start[0] = -math.pi + 2.0 * math.pi * (index + 0.5) / reference.starts
        runs.append(
            BiasedRun(
                molecule.system_xml, molecule.positions, torsions, bias, tuple(float(angle) for angle in start),
                workflow.molecule.temperature, reference.step_fs / 1000.0, reference.friction_per_ps,
                reference.discarded_steps, reference.frame_interval, reference.steps, workflow.seed + 1000 + index,
                folder / f"biased_{index:03d}.npz",
            )
        )  # fmt: skip
    waiting = [run for run in runs if not run.file.is_file()]
    for _ in track(processes(run_biased, waiting), "biased runs", len(waiting)):
        continue
    return [run.file for run in runs]


def _analyse(
    workflow: Workflow, reference: Reference, difference: FreeEnergyDifference, files: list[Path]
) -> dict[str, Any]:
    """Return free energies with errors by the jackknife over starts."""
    beta = 1.0 / thermal_energy(workflow.molecule.temperature)
    low, high = difference.interval
    edges = np.linspace(-180.0, 180.0, _PROFILE_BINS + 1)
    inside, outside, histograms = [], [], []
    column = reference.torsions.index(difference.torsion)
    offsets = []
    loaded = []
    for file in files:
        with np.load(file, allow_pickle=False) as data:
            loaded.append((np.degrees(data["angles"][:, column]), beta * data["bias"]))
        offsets.append(loaded[-1][1].max())
    for angles, bias in loaded:
        weights = np.exp(bias - max(offsets))
        member = (angles >= low) & (angles < high)
        inside.append(weights[member].sum())
        outside.append(weights[~member].sum())
        histograms.append(np.histogram(angles, edges, weights=weights)[0])
    a, b, h = np.array(inside), np.array(outside), np.array(histograms)
    value, error = _jackknife(lambda keep: -np.log(a[keep].sum() / b[keep].sum()), len(files))
    profile, profile_error = _jackknife(lambda keep: -np.log(h[keep].sum(0) / h[keep].sum()), len(files))
    single = -np.log(np.maximum(a, 1e-300) / b)
    return {
        "quantity": f"-ln P({low} <= {difference.torsion} < {high} degrees) / P(elsewhere), in kT",
        "delta_f_kT": float(value),
        "delta_f_error_kT": float(error),
        "delta_f_of_each_start_kT": [float(x) for x in single],
        "profile_torsion": difference.torsion,
        "profile_edges_degrees": [float(x) for x in edges],
        "profile_kT": [float(x) for x in np.asarray(profile) - np.min(profile)],
        "profile_error_kT": [float(x) for x in np.asarray(profile_error)],
        "method": "well-tempered metadynamics bias on the torsions, then independent runs under the fixed bias, "
        "reweighted; errors by the jackknife over the independent starts",
        "temperature_K": workflow.molecule.temperature,
        "settings": json.loads(reference.model_dump_json()),
        "seed": workflow.seed,
        "nanoseconds": reference.starts * reference.steps * reference.step_fs * 1e-6,
    }


def _jackknife(estimate: Any, starts: int) -> tuple[Any, Any]:
    everything = np.ones(starts, dtype=bool)
    with np.errstate(divide="ignore"):
        values = np.array([estimate(np.arange(starts) != left_out) for left_out in range(starts)])
        spread = np.sqrt((starts - 1) / starts * np.square(values - values.mean(0)).sum(0))
        return estimate(everything), spread
