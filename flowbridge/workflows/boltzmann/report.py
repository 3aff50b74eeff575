"""What the report of a Boltzmann generator shows besides the shell of all reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...core.model_files.files import read_header
from ...core.model_files.format import ModelHeader
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..figure_style import torsion_label
from ..information import molecule_formula
from ..report import Page, duration, subscripts
from ..runner import Outcome
from ..stages import Done
from . import figures, run_figures
from .configuration import Model, Workflow
from .report_data import ReportData, gather


def report_page(
    workflow: Workflow,
    molecule: MolecularSystem,
    outcome: Outcome,
    model_file: str,
    reference: Mapping[str, Any] | None = None,
) -> Page:
    """Draw ``figures/*.png`` and return what the report shows.

    Sections for which a run has no data (no named torsions, no free-energy difference, no reference, no second model, no
    dynamics) are left out; without weighted samples, all of them.

    Args:
        workflow: the configuration of the run.
        molecule: what was simulated.
        outcome: of the run.
        model_file: name of the model file next to the report.
        reference: the stored reference free energy, None where there is none.
    """
    done, results = outcome.done, outcome.results
    temperature, title = workflow.molecule.temperature, workflow.molecule.name
    if "reweight" not in done:
        return Page(title, "This run has not come to its weighted samples yet.", hidden=("biases",))
    data = gather(workflow, molecule, done)
    header = read_header(done["train"].folder / "model.flow")
    formula = subscripts(molecule_formula(header))
    context = {
        "workflow": workflow,
        "done": done,
        "formula": formula,
        "simulated": done["simulate"].results or {},
        "figures": _draw(workflow, done, data, reference, workflow.output / "figures"),
        "torsions": [torsion_label(name) for name in workflow.molecule.torsions],
        "difference": _difference(workflow, results),
        "reference": reference,
        "data": data,
        "biases": _biases(workflow, molecule, header, results.get("biases", [])),
        "architectures": _architectures(workflow, results),
        "header": header,
        "model_file": model_file,
    }
    lead = (
        f"A smooth normalizing flow of {formula}, trained on short simulations; its samples are reweighted to the ensemble of "
        f"the force field at {temperature:g} K."
    )
    return Page(title, lead, template="boltzmann/sections.html", context=context, hidden=("biases",))


def _draw(
    workflow: Workflow,
    done: Done,
    data: ReportData,
    reference: Mapping[str, Any] | None,
    folder: Path,
) -> dict[str, Path]:
    """Draw every figure for which there is data; return the files by name."""
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        made[name] = folder / f"{name}.png"
        return made[name]

    torsions = list(workflow.molecule.torsions)[:2]
    if len(torsions) == 2:
        figures.ramachandran(data, torsions, file("ramachandran"))
    elif torsions:
        figures.single_torsion(data, torsions[0], file("torsion"))
    profile = (done["reweight"].results or {}).get("profile")
    if profile is not None:
        figures.profile(profile, data, reference, file("profile"))
    log_weights = data.pooled_log_weights
    figures.marginals(data.bonds, log_weights, "length (nm)", file("bonds"))
    figures.marginals(data.angles, log_weights, "angle (degrees)", file("angles"))
    figures.energy(data.energy, log_weights, file("energy"))
    run_figures.weights(data.log_weights, workflow.targets.ess_percent, file("weights"))
    dynamics = workflow.dynamics
    if data.energies:
        run_figures.energy_conservation(data, dynamics.nve_step_fs, file("energy_conservation"))
    if data.temperatures:
        intervals = {
            "openmm": 1e-3 * dynamics.frame_interval * dynamics.langevin_step_fs,
            "ase": 1e-3 * dynamics.nve_step_fs,
        }
        run_figures.temperature(data.temperatures, workflow.molecule.temperature, intervals, file("temperature"))
    curves = {name: _curves(done[name].results or {}) for name in ("train", "comparison") if name in done}
    if any(points for model in curves.values() for points in model.values()):
        run_figures.training(curves, file("training"))
    return made


def _curves(trained: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Return training curves with the keys of today; stages of former versions have ``effective_share``."""
    former = {"effective_share": "effective_sample_fraction"}
    return {
        stage: [{former.get(key, key): value for key, value in point.items()} for point in points]
        for stage, points in trained.get("curves", {}).items()
    }


def _difference(workflow: Workflow, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the report says about the free-energy difference."""
    settings = workflow.reweight.free_energy
    if settings is None:
        return None
    name = settings.torsion
    low, high = settings.interval
    return {
        "symbol": torsion_label(name),
        "quantity": f"−ln [ P({low:g}° ≤ {torsion_label(name)} < {high:g}°) / P(elsewhere) ]",
        "value": results[f"delta_f_{name}_kT"],
        "error": results[f"delta_f_{name}_error_kT"],
        "of_each_set": results.get(f"delta_f_{name}_of_each_set_kT", []),
        "unweighted": results.get(f"unweighted_delta_f_{name}_kT"),
        "training": results.get(f"training_delta_f_{name}_kT"),
        "reference": results.get(f"reference_delta_f_{name}_kT"),
        "reference_error": results.get(f"reference_delta_f_{name}_error_kT"),
    }


def _biases(
    workflow: Workflow, molecule: MolecularSystem, header: ModelHeader, biases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the biases of the training with the atoms of their torsions by name."""
    if not biases:
        return []
    particles = header.particles
    rows = [row for row in build_zmatrix(particles).rows if row.torsion >= 0]
    circular = header.configuration["layout"]["circular"]
    named = {molecule.torsion_atoms(atoms): torsion_label(name) for name, atoms in workflow.molecule.torsions.items()}
    described = []
    for bias in biases:
        row = rows[circular[bias["circular"]]]
        atoms = (row.atom, row.bond, row.angle, row.torsion)
        label = "–".join(particles.names[atom] for atom in atoms)
        known = named.get(atoms) or named.get(atoms[::-1])
        described.append(
            {
                "torsion": f"{known} ({label})" if known else label,
                "centre": (360.0 * bias["centre"] + 180.0) % 360.0 - 180.0,
                "height": bias["height"],
            }
        )
    return described


def _architectures(workflow: Workflow, results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows (what, this run's flow, the other one) of the comparison; none where there is no second model."""
    other = results.get("comparison", {})
    if workflow.comparison is None or "ess_percent" not in other or "force_rmse_kT_nm" not in results:
        return []
    seconds = results["wall_seconds"]["train"]
    return [
        *[
            (what, first, second)
            for (what, first), (_, second) in zip(
                _architecture(workflow.model), _architecture(workflow.comparison), strict=True
            )
        ],
        ("parameters", f"{results['parameters']:,}", f"{other['parameters']:,}"),
        ("samples weighted", f"{results['samples']:,}", f"{other['samples']:,}"),
        ("effective sample size (%)", f"{results['ess_percent']:.2f}", f"{other['ess_percent']:.2f}"),
        (
            "force error on held-out frames (kT/nm), root mean square",
            f"{results['force_rmse_kT_nm']:.2f}",
            f"{other['force_rmse_kT_nm']:.2f}",
        ),
        (
            "the same, median frame",
            f"{results['force_rmse_median_frame_kT_nm']:.2f}",
            f"{other['force_rmse_median_frame_kT_nm']:.2f}",
        ),
        ("training time", duration(seconds), duration(results["wall_seconds"]["comparison"])),
    ]


def _architecture(model: Model) -> Iterator[tuple[str, str]]:
    flow, training = model.flow, model.training
    yield "circular torsions", {"soft": "those that turn", "all": "all"}[flow.circular]
    yield (
        "torsions",
        f"{flow.torsions.couplings} couplings of {flow.torsions.components} smooth bumps",
    )
    bumps = f" of {flow.stiff.components} smooth bumps" if flow.stiff.transform == "bumps" else ""
    transform = {"sinh_arcsinh": "sinh-arcsinh ", "affine": "affine ", "bumps": ""}[flow.stiff.transform]
    yield "bonds, angles, stiff torsions", f"{flow.stiff.couplings} {transform}couplings{bumps}, {flow.stiff.map}"
    for name, stage in (("likelihood", training.likelihood), ("refinement", training.refinement)):
        yield f"{name} steps × batch", f"{stage.steps} × {stage.batch}" if stage.steps else "none"
