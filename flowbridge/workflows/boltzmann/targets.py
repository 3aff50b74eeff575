"""What a run is asked to reach, and whether it did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from ...core.configuration import StrictModel


class Targets(StrictModel):
    """Limits that the numbers of a run are held against."""

    ess_percent: PositiveFloat = Field(default=90.0, description="least effective sample size, Kish, unclipped")
    samples: PositiveInt = Field(default=100_000, description="least number of samples behind it")
    delta_f_kT: PositiveFloat = Field(default=0.2, description="largest difference from the reference")
    delta_f_standard_errors: PositiveFloat = Field(default=2.0, description="the same, in combined standard errors")
    training_offset_kT: PositiveFloat = Field(default=2.0, description="what the training data are off by, at least")
    nve_ratio: PositiveFloat = Field(default=1.2, description="energy fluctuation of the flow over the force field's")
    force_rmse_kT_nm: PositiveFloat = 20.0
    js_divergence: PositiveFloat = 0.02
    ase_openmm_force_difference: PositiveFloat = Field(default=1e-4, description="relative")
    wall_seconds: PositiveFloat | None = Field(default=None, description="total of all stages; None for no limit")


@dataclass(frozen=True)
class Check:
    """One requirement: the key in ``results.json``, what is asked, what was measured, and whether that is enough.

    ``met`` is None where nothing is asked.
    """

    key: str
    required: str
    measured: str
    met: bool | None
    note: str = ""


def checks(results: Mapping[str, Any], torsion: str | None, targets: Targets) -> list[Check]:
    """Return the requirements that apply to a run.

    Args:
        results: what ``results.json`` holds; a requirement whose keys are missing (no second torsion, no reference) is
            left out.
        torsion: of the free-energy difference, None where the run has none.
        targets: the limits.
    """
    found = [*_sampling(results, targets)]
    if torsion is not None:
        found += _free_energy(results, torsion, targets)
    found += [*_potential(results, targets), *_time(results, targets)]
    return found


def _sampling(results: Mapping[str, Any], targets: Targets) -> Iterator[Check]:
    if "ess_percent" not in results:
        return
    value, samples = float(results["ess_percent"]), int(results["samples"])
    others = ", ".join(f"{x:.1f}" for x in results.get("ess_percent_of_each_set", [])[1:])
    yield Check(
        "ess_percent",
        f"≥ {targets.ess_percent:g} of ≥ {targets.samples:,} samples",
        f"{value:.1f} of {samples:,} samples",
        value >= targets.ess_percent and samples >= targets.samples,
        f"unclipped Kish effective sample size; other independent sets: {others}" if others else "unclipped, Kish",
    )


def _free_energy(results: Mapping[str, Any], torsion: str, targets: Targets) -> Iterator[Check]:
    value, error = results.get(f"delta_f_{torsion}_kT"), results.get(f"delta_f_{torsion}_error_kT")
    reference = results.get(f"reference_delta_f_{torsion}_kT")
    reference_error = results.get(f"reference_delta_f_{torsion}_error_kT")
    if value is None or error is None or reference is None or reference_error is None:
        return
    difference, combined = abs(value - reference), math.hypot(error, reference_error)
    in_errors = difference / combined if combined > 0.0 else math.inf
    yield Check(
        f"delta_f_{torsion}_kT",
        f"reference {reference:.3f} ± {reference_error:.3f}, within {targets.delta_f_kT:g} kT",
        f"{value:.3f} ± {error:.3f} (off by {difference:.3f})",
        difference <= targets.delta_f_kT,
        "errors are one standard error",
    )
    yield Check(
        f"delta_f_{torsion}_error_kT",
        f"difference ≤ {targets.delta_f_standard_errors:g} combined standard errors ({combined:.3f} kT)",
        f"{in_errors:.2f} combined standard errors",
        in_errors <= targets.delta_f_standard_errors,
        "one or less in two runs out of three, if value and errors are right",
    )
    training = results.get(f"training_delta_f_{torsion}_kT")
    if training is not None:
        offset = abs(training - reference)
        yield Check(
            f"training_delta_f_{torsion}_kT",
            f"off by > {targets.training_offset_kT:g} kT, on purpose",
            f"{training:.3f} (off by {offset:.3f})",
            offset > targets.training_offset_kT,
            "the training data must not contain the answer",
        )


def _potential(results: Mapping[str, Any], targets: Targets) -> Iterator[Check]:
    flow, force_field = results.get("nve_std_per_dof_kJ_mol"), results.get("force_field_nve_std_per_dof_kJ_mol")
    if flow is not None and force_field is not None:
        yield Check(
            "nve_std_per_dof_kJ_mol",
            f"≤ {targets.nve_ratio:g} × the force field's {force_field:.5f}",
            f"{flow:.5f} ({flow / force_field:.2f} ×)",
            flow <= targets.nve_ratio * force_field,
            "standard deviation of the total energy at constant energy",
        )
    rmse = results.get("force_rmse_kT_nm")
    if rmse is not None:
        median = results.get("force_rmse_median_frame_kT_nm")
        note = "on held-out frames" + (f"; median frame {median:.2f}" if median is not None else "")
        limit = targets.force_rmse_kT_nm
        yield Check("force_rmse_kT_nm", f"≤ {limit:g} kT/nm", f"{rmse:.2f} kT/nm", rmse <= limit, note)
    divergence = results.get("js_divergence_md_vs_samples")
    if divergence is not None:
        noise = results.get("js_divergence_expected_from_noise")
        note = f"finite trajectories alone would give about {noise:.4f}" if noise is not None else ""
        limit = targets.js_divergence
        yield Check("js_divergence_md_vs_samples", f"≤ {limit:g}", f"{divergence:.4f}", divergence <= limit, note)
    force = results.get("ase_openmm_max_force_difference")
    if force is not None:
        limit = targets.ase_openmm_force_difference
        note = "relative to the largest force of the frame"
        yield Check("ase_openmm_max_force_difference", f"≤ {limit:g}", f"{force:.1e}", force <= limit, note)


def _time(results: Mapping[str, Any], targets: Targets) -> Iterator[Check]:
    if "wall_seconds" not in results:
        return
    seconds, limit = results["wall_seconds"], targets.wall_seconds
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    total = float(seconds["total"])
    required, met = ("no limit set", None) if limit is None else (f"total ≤ {limit:g} s", total <= limit)
    yield Check("wall_seconds", required, f"{total:.0f} s", met, stages)
