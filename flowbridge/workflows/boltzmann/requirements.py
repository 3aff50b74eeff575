"""Requirements that a user sets for a run (the table ``[targets]``), and whether its results meet them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from ...core.configuration import StrictModel
from ..report import Check


class Requirements(StrictModel):
    """Limits that the results of a run are checked against; those that the TOML does not set are not checked."""

    ess_percent: PositiveFloat | None = Field(default=None, description="least effective sample size, Kish, unclipped")
    samples: PositiveInt | None = Field(default=None, description="least number of samples in a set")
    delta_f_kT: PositiveFloat | None = Field(default=None, description="largest difference from the reference")
    delta_f_standard_errors: PositiveFloat | None = Field(
        default=None, description="the same, in combined standard errors"
    )
    training_offset_kT: PositiveFloat | None = Field(
        default=None, description="least difference of the training data from the reference"
    )
    nve_ratio: PositiveFloat | None = Field(
        default=None, description="largest energy fluctuation of the flow over that of the force field"
    )
    force_rmse_kT_nm: PositiveFloat | None = Field(default=None, description="largest force error, held-out frames")
    js_divergence: PositiveFloat | None = Field(
        default=None, description="largest Jensen-Shannon divergence of dynamics and samples, nats"
    )
    ase_openmm_force_difference: PositiveFloat | None = Field(
        default=None, description="largest difference, relative to the largest force of a frame"
    )
    wall_seconds: PositiveFloat | None = Field(default=None, description="largest total time of all stages")


def checks(results: Mapping[str, Any], torsion: str | None, limits: Requirements) -> list[Check]:
    """Return the requirements that are set and have been measured.

    Args:
        results: what ``results.json`` holds; a requirement whose keys are missing (no second torsion, no reference, a stage
            that was left out) is not checked.
        torsion: of the free-energy difference, None where the run has none.
        limits: the requirements.
    """
    found = [*_sampling(results, limits)]
    if torsion is not None:
        found += _free_energy(results, torsion, limits)
    found += [*_potential(results, limits), *_time(results, limits)]
    return found


def _sampling(results: Mapping[str, Any], limits: Requirements) -> Iterator[Check]:
    if "ess_percent" not in results:
        return
    if limits.ess_percent is not None:
        value = float(results["ess_percent"])
        others = ", ".join(f"{x:.1f}" for x in results.get("ess_percent_of_each_set", [])[1:])
        note = (
            f"unclipped Kish effective sample size; other independent sets: {others}" if others else "unclipped, Kish"
        )
        least = limits.ess_percent
        yield Check("ess_percent", f"≥ {least:g} %", f"{value:.1f} %", value >= least, note)
    if limits.samples is not None:
        samples = int(results["samples"])
        yield Check("samples", f"≥ {limits.samples:,}", f"{samples:,}", samples >= limits.samples)


def _free_energy(results: Mapping[str, Any], torsion: str, limits: Requirements) -> Iterator[Check]:
    value, error = results.get(f"delta_f_{torsion}_kT"), results.get(f"delta_f_{torsion}_error_kT")
    reference = results.get(f"reference_delta_f_{torsion}_kT")
    reference_error = results.get(f"reference_delta_f_{torsion}_error_kT")
    if value is None or error is None or reference is None or reference_error is None:
        return
    difference, combined = abs(value - reference), math.hypot(error, reference_error)
    if limits.delta_f_kT is not None:
        yield Check(
            f"delta_f_{torsion}_kT",
            f"reference {reference:.3f} ± {reference_error:.3f}, within {limits.delta_f_kT:g} kT",
            f"{value:.3f} ± {error:.3f} (off by {difference:.3f})",
            difference <= limits.delta_f_kT,
            "errors are one standard error",
        )
    if limits.delta_f_standard_errors is not None:
        in_errors = difference / combined if combined > 0.0 else math.inf
        yield Check(
            f"delta_f_{torsion}_error_kT",
            f"difference ≤ {limits.delta_f_standard_errors:g} combined standard errors ({combined:.3f} kT)",
            f"{in_errors:.2f} combined standard errors",
            in_errors <= limits.delta_f_standard_errors,
            "one or less in two runs out of three, if value and errors are right",
        )
    training = results.get(f"training_delta_f_{torsion}_kT")
    if training is not None and limits.training_offset_kT is not None:
        offset = abs(training - reference)
        yield Check(
            f"training_delta_f_{torsion}_kT",
            f"off by > {limits.training_offset_kT:g} kT, on purpose",
            f"{training:.3f} (off by {offset:.3f})",
            offset > limits.training_offset_kT,
            "the training data must not contain the answer",
        )


def _potential(results: Mapping[str, Any], limits: Requirements) -> Iterator[Check]:
    flow, force_field = results.get("nve_std_per_dof_kJ_mol"), results.get("force_field_nve_std_per_dof_kJ_mol")
    ratio = limits.nve_ratio
    if flow is not None and force_field is not None and ratio is not None:
        yield Check(
            "nve_std_per_dof_kJ_mol",
            f"≤ {ratio:g} × the force field's {force_field:.5f}",
            f"{flow:.5f} ({flow / force_field:.2f} ×)",
            flow <= ratio * force_field,
            "standard deviation of the total energy at constant energy",
        )
    median, noise = results.get("force_rmse_median_frame_kT_nm"), results.get("js_divergence_expected_from_noise")
    for key, limit, digits, unit, note in (
        ("force_rmse_kT_nm", limits.force_rmse_kT_nm, ".2f", " kT/nm",
         "on held-out frames" + ("" if median is None else f"; median frame {median:.2f}")),
        ("js_divergence_md_vs_samples", limits.js_divergence, ".4f", "",
         "" if noise is None else f"finite trajectories alone would give about {noise:.4f}"),
        ("ase_openmm_max_force_difference", limits.ase_openmm_force_difference, ".1e", "",
         "relative to the largest force of the frame"),
    ):  # fmt: skip
        value = results.get(key)
        if value is not None and limit is not None:
            yield Check(key, f"≤ {limit:g}{unit}", f"{value:{digits}}{unit}", value <= limit, note)


def _time(results: Mapping[str, Any], limits: Requirements) -> Iterator[Check]:
    if "wall_seconds" in results and limits.wall_seconds is not None:
        seconds = results["wall_seconds"]
        stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
        total, most = float(seconds["total"]), limits.wall_seconds
        yield Check("wall_seconds", f"total ≤ {most:g} s", f"{total:.0f} s", total <= most, stages)
