"""The report of a run: figures, and one HTML file that holds everything and loads nothing."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ...core.model_files.files import read_header
from ...core.model_files.format import ModelHeader
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..figure_style import torsion_label
from ..information import molecule_formula
from ..stages import Stage
from . import figures, run_figures
from .configuration import Model, Workflow
from .report_data import ReportData, gather
from .targets import Targets, checks

_PACKAGES = ("flowbridge", "torch", "openmm", "ase", "mdtraj", "numpy", "scipy", "matplotlib")
_HIDDEN = ("curves", "profile", "biases")  # long lists; the first two are figures, the last a table of its own
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_STAGE_TITLES = {
    "simulate": "simulate: training data",
    "train": "train: likelihood, then refinement",
    "comparison": "train the model to compare with",
    "drive": "drive: dynamics in OpenMM and ASE",
    "reweight": "reweight: samples and weights",
    "total": "total",
}


def write(
    workflow: Workflow,
    molecule: MolecularSystem,
    stages: dict[str, Stage],
    results: dict[str, Any],
    output: Path,
    reference: dict[str, Any] | None = None,
    targets: Targets | None = None,
) -> Path:
    """Write ``figures/*.png`` and ``report.html`` into ``output``; return the path of the report.

    Sections for which a run has no data (no named torsions, no free-energy difference, no reference, no second model)
    are left out.

    Args:
        workflow: the configuration of the run.
        molecule: what was simulated.
        stages: finished stages by name: ``simulate``, ``train``, ``drive``, ``reweight``, perhaps ``comparison``.
        results: what ``results.json`` holds.
        output: folder of the run.
        reference: the stored reference free energy, None where there is none.
        targets: limits for the headline table; None for the defaults.
    """
    limits = targets or Targets()
    data = gather(workflow, molecule, stages)
    drawings = _draw(workflow, stages, data, reference, limits, output / "figures")
    header = read_header(stages["train"].folder / "model.flow")
    trained = stages["train"].results or {}
    difference = workflow.reweight.free_energy
    verdicts = checks(results, difference.torsion if difference else None, limits)
    page = _environment().from_string(files(__package__).joinpath("report.html").read_text("utf-8"))
    text = page.render(
        workflow=workflow,
        title=workflow.molecule.name,
        formula=molecule_formula(header).translate(_SUBSCRIPTS),
        checks=verdicts,
        judged=sum(check.met is not None for check in verdicts),
        met=sum(check.met is True for check in verdicts),
        results=results,
        simulated=stages["simulate"].results or {},
        figures={name: _inlined(file) for name, file in drawings.items()},
        torsions=[torsion_label(name) for name in workflow.molecule.torsions],
        difference=_difference(workflow, results),
        reference=reference,
        data=data,
        biases=_biases(workflow, molecule, header, trained.get("biases", [])),
        architectures=_architectures(workflow, results),
        stage_seconds=[(_STAGE_TITLES.get(name, name), value) for name, value in results["wall_seconds"].items()],
        header=header,
        versions=_versions(header),
        model_file=_published_model(output, header.digest),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors",
        all_results=list(_flattened({key: value for key, value in results.items() if key not in _HIDDEN})),
    )
    report = output / "report.html"
    part = report.with_suffix(".html.part")
    part.write_text(text, encoding="utf-8")
    part.replace(report)
    return report


def _draw(
    workflow: Workflow,
    stages: Mapping[str, Stage],
    data: ReportData,
    reference: Mapping[str, Any] | None,
    targets: Targets,
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
    profile = (stages["reweight"].results or {}).get("profile")
    if profile is not None:
        figures.profile(profile, data, reference, file("profile"))
    log_weights = data.pooled_log_weights
    figures.marginals(data.bonds, log_weights, "length (nm)", file("bonds"))
    figures.marginals(data.angles, log_weights, "angle (degrees)", file("angles"))
    figures.energy(data.energy, log_weights, file("energy"))
    run_figures.weights(data.log_weights, targets.ess_percent, file("weights"))
    drive = workflow.drive
    if data.energies:
        run_figures.energy_conservation(data, drive.nve_step_fs, file("energy_conservation"))
    if data.temperatures:
        intervals = {
            "openmm": 1e-3 * drive.frame_interval * drive.langevin_step_fs,
            "ase": 1e-3 * drive.nve_step_fs,
        }
        run_figures.temperature(data.temperatures, workflow.molecule.temperature, intervals, file("temperature"))
    curves = {
        name: (stages[name].results or {}).get("curves", {}) for name in ("train", "comparison") if name in stages
    }
    if any(points for model in curves.values() for points in model.values()):
        run_figures.training(curves, file("training"))
    return made


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["duration"] = _duration
    return environment


def _number(value: Any) -> str:
    """Return a number with the digits of ``results.json`` that matter (six significant)."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _inlined(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


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
    other = results.get("comparison")
    if workflow.comparison is None or other is None:
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
        ("training time", _duration(seconds), _duration(other["wall_seconds"])),
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


def _versions(header: ModelHeader) -> dict[str, str]:
    """Return versions of what runs now; the model file has those it was written with."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = header.versions.get(name, "not installed")
    return found


def _published_model(output: Path, digest: str) -> str:
    """Return the name of the model file at the top of the output folder, by its digest."""
    for file in sorted(output.glob("*.flow")):
        if read_header(file).digest == digest:
            return file.name
    return "model.flow"


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", _listed(value)
        else:
            yield f"{prefix}{key}", _number(value)


def _listed(values: list[Any]) -> str:
    if any(isinstance(value, Mapping) for value in values):
        return json.dumps(values)
    return ", ".join(f"({_listed(value)})" if isinstance(value, list) else _number(value) for value in values)
