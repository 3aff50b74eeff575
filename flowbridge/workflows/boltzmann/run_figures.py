"""Figures of the run itself: weights, energy conservation, temperature, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ...core.statistics.estimates import scaled_weights
from ..figure_style import COMPARISON, DRIVEN, FLOW, MD, REFERENCE, REWEIGHTED, drawn
from .report_data import ReportData

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_LOWEST_SHARE = 1e-4  # of the samples lie left of the axis of log-weights
_SHADES = (REWEIGHTED, "#e6a06f", "#7d3119", "#f0c39b")


def weights(log_weights: Sequence[FloatArray], least_percent: float | None, file: Path) -> None:
    """Draw the log-weights of each independent set and how its effective sample size settles as samples are added."""
    with drawn(file, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        centred = [one - np.log(np.exp(one - one.max()).mean()) - one.max() for one in log_weights]
        finite = np.concatenate([one[np.isfinite(one)] for one in centred])
        edges = np.linspace(np.quantile(finite, _LOWEST_SHARE), finite.max() + 0.05, 81)
        for number, one in enumerate(centred):
            colour, label = _SHADES[number % len(_SHADES)], f"set {number + 1}"
            left.stairs(np.histogram(one, edges)[0] / one.size, edges, color=colour, label=label, linewidth=1.3)
            counts, percent = running_effective_percent(log_weights[number])
            right.plot(counts, percent, color=colour)
        left.axvline(0.0, color=REFERENCE, linewidth=0.8, linestyle=":")
        left.set_yscale("log")
        left.set_xlabel("ln (w / mean w)")
        left.set_ylabel("share of samples in the bin")
        if least_percent is not None:
            label = f"required: {least_percent:g} %"
            right.axhline(least_percent, color=REFERENCE, linewidth=0.8, linestyle=":", label=label)
        right.set_xscale("log")
        right.set_ylim(0.0, 100.0)
        right.set_xlabel("samples")
        right.set_ylabel("effective sample size (%)")
        figure.legend(loc="outside upper center", ncols=len(centred) + 1)


def running_effective_percent(log_weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return numbers of samples, and Kish's effective sample size in percent of the first so many."""
    weight = scaled_weights(log_weights)
    first, second = np.cumsum(weight), np.cumsum(weight**2)
    counts = np.unique(np.geomspace(min(100, weight.size), weight.size, 200).astype(int))
    kept = counts[second[counts - 1] > 0.0]
    percent: FloatArray = 100.0 * first[kept - 1] ** 2 / second[kept - 1] / kept
    return kept.astype(np.float64), percent


def energy_conservation(data: ReportData, step_fs: float, file: Path) -> None:
    """Draw total energy per degree of freedom, less its mean, against time: one panel a run, one common axis."""
    titles = {
        "nve_flow_0": ("flow in OpenMM", DRIVEN),
        "nve_force_field_0": ("force field in OpenMM", MD),
        "ase_nve": ("flow in ASE", DRIVEN),
    }
    present = [name for name in titles if name in data.energies]
    lengths = [max(len(data.energies[name]), 1) for name in present]
    # A short run keeps a panel wide enough for its title.
    ratios = [max(length / max(lengths), 0.45) for length in lengths]
    with drawn(file, 2.9) as figure:
        row = figure.subplots(1, len(present), sharey=True, width_ratios=ratios, squeeze=False)[0]
        for axes, name in zip(row, present, strict=True):
            energies = data.energies[name]
            time = 1e-3 * step_fs * np.arange(1, len(energies) + 1)
            title, colour = titles[name]
            deviation = (energies - energies.mean()) / data.degrees_of_freedom
            axes.plot(time, deviation, color=colour, linewidth=0.5)
            axes.set_title(f"{title}: {deviation.std():.4f}")
            axes.set_xlabel("time (ps)")
            axes.set_xlim(0.0, time[-1])
            axes.xaxis.set_major_locator(MaxNLocator(5 if len(energies) == max(lengths) else 3))
        row[0].set_ylabel("E − mean E, per degree\nof freedom (kJ/mol)")


def temperature(
    temperatures: Mapping[str, FloatArray], thermostat: float, intervals_ps: Mapping[str, float], file: Path
) -> None:
    """Draw the kinetic temperature of Langevin dynamics of the flow against time.

    Args:
        temperatures: by run, ``openmm`` and ``ase``.
        thermostat: its temperature, K.
        intervals_ps: time between two values, by run.
        file: PNG to write.
    """
    titles = {"openmm": "OpenMM, mean over replicas", "ase": "ASE, one molecule"}
    present = [name for name in titles if name in temperatures]
    with drawn(file, 2.7) as figure:
        row = figure.subplots(1, len(present), squeeze=False)[0]
        for axes, name in zip(row, present, strict=True):
            values = temperatures[name]
            axes.plot(intervals_ps[name] * np.arange(1, len(values) + 1), values, color=DRIVEN, linewidth=0.8)
            axes.axhline(thermostat, color=REFERENCE, linewidth=0.8, linestyle=":")
            axes.set_title(f"{titles[name]}: {values.mean():.1f} K")
            axes.set_xlabel("time (ps)")
            axes.set_xlim(0.0, intervals_ps[name] * len(values))
            axes.xaxis.set_major_locator(MaxNLocator(6))
        row[0].set_ylabel("temperature (K)")


def training(curves: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw the training curves, a panel for each stage of each model.

    Args:
        curves: ``curves`` of each training stage: ``train``, and ``comparison`` where there is one.
        file: PNG to write.
    """
    colours = {"train": FLOW, "comparison": COMPARISON}
    names = {"train": "", "comparison": "comparison: "}
    panels = [
        (names[model] + title, label, stages[stage], key, colours[model], scale)
        for model, stages in curves.items()
        for stage, key, title, label, scale in (
            ("likelihood", "nll", "maximum likelihood", "mean −ln likelihood", 1.0),
            (
                "refinement",
                "effective_sample_fraction",
                "refinement on own samples",
                "effective size of a batch (%)",
                100.0,
            ),
        )
        if any(key in point for point in stages.get(stage, []))
    ]
    with drawn(file, 3.0) as figure:
        row = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
        for axes, (title, label, curve, key, colour, scale) in zip(row, panels, strict=False):
            steps, values = _points(curve, key, scale)
            held_out = _points(curve, "held_out_nll", 1.0)
            axes.plot(steps, values, color=colour, marker="o", markersize=2.5, label="batches")
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            if scale == 100.0:
                axes.set_ylim(0.0, 100.0)
            elif len(held_out[0]):
                # Held-out frames become unlikely without bound where a flow is over-trained: the panel follows the batches.
                margin = 0.25 * float(np.ptp(values)) + 1.0
                axes.set_ylim(values.min() - margin, values.max() + margin)
                axes.plot(*held_out, color=REFERENCE, marker="s", markersize=2.5, label="held-out frames")
                axes.legend(loc="upper right")


def _points(curve: Sequence[Mapping[str, float]], key: str, scale: float) -> tuple[FloatArray, FloatArray]:
    """Return the steps at which a curve has a value, and the values."""
    kept = [(point["step"], scale * point[key]) for point in curve if key in point]
    steps, values = np.array(kept).reshape(-1, 2).T
    return steps, values
