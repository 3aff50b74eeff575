"""Figures of ensembles: where the molecule is, in the data, in the flow, in its dynamics, and reweighted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...core.statistics.estimates import scaled_weights
from ..figure_style import DRIVEN, FLOW, MD, REFERENCE, REWEIGHTED, circular_axis, drawn, quiet_counts, torsion_label
from .report_data import Marginal, ReportData, Torsions

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_MAP_BINS = 60  # of 6 degrees
_LINE_BINS = 60
_HEADROOM = 3.0  # kT above the highest curve: single samples of tiny weight may lie far above it
_MEANINGFUL = 1.0  # kT: differences with larger errors do not set the scale
_CENTRAL = 0.05  # percent left outside the axes on either side of a marginal
_SCALE = LinearSegmentedColormap.from_list(
    "free energy", ["#16324f", "#2a6f97", "#61a5c2", "#a9d6c5", "#e9e3b4", "#f3b562", "#e2725b"]
).with_extremes(over="#dfe3e7")


def _ensembles(data: ReportData) -> Iterator[tuple[str, Torsions, bool, str]]:
    """Yield name, torsions, whether they are weighted, and colour of each ensemble."""
    yield "training data", data.training, False, MD
    yield "flow, as sampled", data.flow, False, FLOW
    if data.driven is not None:
        yield "dynamics of the flow", data.driven, False, DRIVEN
    yield "flow, reweighted", data.flow, True, REWEIGHTED


def ramachandran(data: ReportData, names: Sequence[str], file: Path) -> None:
    """Draw -ln p over two torsions in the ensembles, on one scale in kT."""
    first, second = names
    panels = [(title, torsions, weighted) for title, torsions, weighted, _ in _ensembles(data)]
    maps = [free_energy_map(torsions, first, second, weighted) for _, torsions, weighted in panels]
    # A sample in a bin is worth at most ln(samples); a weight can make it worth anything, and would stretch the scale.
    counted = [one for one, (_, _, weighted) in zip(maps, panels, strict=True) if not weighted]
    highest = max(float(np.ceil(one[np.isfinite(one)].max())) for one in counted)
    with drawn(file, 2.75) as figure:
        row = figure.subplots(1, len(panels), sharex=True, sharey=True)
        for axes, (title, _, _), energies in zip(row, panels, maps, strict=True):
            image = axes.imshow(
                np.ma.masked_invalid(energies.T), origin="lower", extent=(-180, 180, -180, 180), cmap=_SCALE,
                vmin=0.0, vmax=highest, interpolation="nearest", aspect="equal",
            )  # fmt: skip
            axes.set_title(title)
            circular_axis(axes, first)
            axes.spines[["top", "right"]].set_visible(True)
        circular_axis(row[0], second, vertical=True)
        beyond = any((one[np.isfinite(one)] > highest).any() for one in maps)
        bar = figure.colorbar(image, ax=row, shrink=0.9, pad=0.015, aspect=16, extend="max" if beyond else "neither")
        bar.set_label("−ln p (kT)")
        bar.outline.set_visible(False)


def free_energy_map(torsions: Torsions, first: str, second: str, weighted: bool) -> FloatArray:
    """Return -ln p in kT over two torsions in bins of 6 degrees, ``(60, 60)``, above its minimum; inf without samples."""
    edges = np.linspace(-180.0, 180.0, _MAP_BINS + 1)
    weights = scaled_weights(torsions.log_weights) if weighted and torsions.log_weights is not None else None
    counts = np.histogram2d(torsions.values[first], torsions.values[second], [edges, edges], weights=weights)[0]
    with np.errstate(divide="ignore"):
        energies = -np.log(counts / counts.sum())
    lowest: FloatArray = energies - energies.min()
    return lowest


def single_torsion(data: ReportData, name: str, file: Path) -> None:
    """Draw the density of one torsion in the ensembles."""
    with drawn(file, 3.4) as figure:
        axes = figure.subplots()
        edges = np.linspace(-180.0, 180.0, _LINE_BINS + 1)
        for label, torsions, weighted, colour in _ensembles(data):
            weights = scaled_weights(torsions.log_weights) if weighted and torsions.log_weights is not None else None
            counts = np.histogram(torsions.values[name], edges, weights=weights)[0]
            axes.stairs(counts / counts.sum() / np.diff(edges), edges, color=colour, label=label, linewidth=1.6)
        circular_axis(axes, name)
        axes.set_ylabel("density (1/degree)")
        axes.set_ylim(bottom=0.0)
        figure.legend(loc="outside upper center", ncols=4)


def profile(result: Mapping[str, Any], data: ReportData, reference: Mapping[str, Any] | None, file: Path) -> None:
    """Draw the free energy along one torsion: reweighted with errors, training data, reference with errors.

    All curves are -ln of normalised densities, shifted by one common constant, so that nothing is aligned by eye or
    by the noise of a minimum. Below, the difference between reweighted samples and reference where their bins agree.

    Args:
        result: ``profile`` of the reweight stage.
        data: for the curves of training data and unweighted samples.
        reference: the stored reference, None where there is none.
        file: PNG to write.
    """
    name, edges = str(result["torsion"]), np.asarray(result["edges_degrees"])
    value, error = normalised(_numbers(result["free_energy_kT"]), edges), _numbers(result["error_kT"])
    known = _reference_profile(reference, name)
    zero = float(np.nanmin(value if known is None else known.free_energy))
    comparable = known is not None and len(known.edges) == len(edges) and np.allclose(known.edges, edges)
    with drawn(file, 5.6 if comparable else 4.2) as figure:
        rows = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]) if comparable else [figure.subplots()]
        axes, highest = rows[0], 0.0
        for label, torsions, colour in (("training data", data.training, MD), ("flow, as sampled", data.flow, FLOW)):
            counted = _from_counts(torsions.values[name], edges) - zero
            axes.stairs(counted, edges, color=colour, label=label, baseline=None)
            highest = max(highest, float(np.nanmax(counted)))
        if known is not None:
            low, high = (known.free_energy - zero + sign * known.error for sign in (-1.0, 1.0))
            axes.plot(_centres(known.edges), 0.5 * (low + high), color=REFERENCE, linewidth=1.2, label="reference")
            axes.fill_between(_centres(known.edges), low, high, color=REFERENCE, alpha=0.25, linewidth=0)
            highest = max(highest, float(np.nanmax(high)))
        _points(axes, _centres(edges), value - zero, error, "flow, reweighted")
        axes.set_ylim(top=min(axes.get_ylim()[1], highest + _HEADROOM))
        axes.set_ylabel(f"−ln p({torsion_label(name)}) (kT)")
        figure.legend(loc="outside upper center", ncols=4)
        if comparable and known is not None:
            _residuals(rows[1], edges, value - known.free_energy, np.hypot(error, known.error))
        circular_axis(rows[-1], name)


def _residuals(axes: Axes, edges: FloatArray, difference: FloatArray, error: FloatArray) -> None:
    _points(axes, _centres(edges), difference, error, None)
    axes.axhline(0.0, color=REFERENCE, linewidth=1.0)
    axes.set_ylabel("difference (kT)")
    limit = float(np.clip(1.2 * np.abs(difference[error < _MEANINGFUL]).max(initial=0.0), 0.3, 3.0))
    axes.set_ylim(-limit, limit)


def _centres(edges: FloatArray) -> FloatArray:
    centres: FloatArray = 0.5 * (edges[1:] + edges[:-1])
    return centres


def _points(axes: Axes, x: FloatArray, y: FloatArray, error: FloatArray, label: str | None) -> None:
    axes.errorbar(
        x, y, error, color=REWEIGHTED, fmt="o", markersize=3.2, linewidth=1.1, capsize=0, label=label, zorder=3
    )


def _numbers(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def normalised(free_energy: FloatArray, edges: FloatArray) -> FloatArray:
    """Return -ln p shifted so that p is a density per degree; NaN marks bins without samples."""
    return free_energy + float(np.log(np.nansum(np.exp(-free_energy) * np.diff(edges))))


def _from_counts(values: FloatArray, edges: FloatArray) -> FloatArray:
    counts = np.histogram(values, edges)[0] / np.diff(edges) / len(values)
    filled: FloatArray = np.full(counts.shape, np.nan)
    filled[counts > 0] = -np.log(counts[counts > 0])
    return filled


class _Profile(NamedTuple):
    """Edges in degrees, -ln of the density per degree, and its standard error."""

    edges: FloatArray
    free_energy: FloatArray
    error: FloatArray


def _reference_profile(reference: Mapping[str, Any] | None, name: str) -> _Profile | None:
    if reference is None or reference.get("profile_torsion") != name:
        return None
    edges = np.asarray(reference["profile_edges_degrees"])
    return _Profile(
        edges, normalised(_numbers(reference["profile_kT"]), edges), _numbers(reference["profile_error_kT"])
    )


def marginals(panels: Sequence[Marginal], log_weights: FloatArray, quantity: str, file: Path) -> None:
    """Draw densities of MD frames, samples and reweighted samples, one panel a type.

    Args:
        panels: up to eight types.
        log_weights: ``(S,)``.
        quantity: label of the abscissa, with its unit.
        file: PNG to write.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    weights = scaled_weights(log_weights)
    with drawn(file, 0.5 + 1.95 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _densities(axes, panel, weights, bins=80)
            axes.set_title(f"{panel.label}  × {panel.terms}" if panel.terms > 1 else panel.label)
            quiet_counts(axes)
            axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel(quantity, fontsize=10)
        _legend(figure, grid[0])


def energy(panel: Marginal, log_weights: FloatArray, file: Path) -> None:
    """Draw densities of the potential energy in kT, linear and logarithmic."""
    weights = scaled_weights(log_weights)
    with drawn(file, 3.3) as figure:
        left, right = figure.subplots(1, 2)
        _densities(left, panel, weights, bins=80)
        quiet_counts(left)
        _densities(right, panel, weights, bins=80)
        right.set_yscale("log")
        for axes in (left, right):
            axes.set_xlabel("U / kT")
        left.set_title("density")
        right.set_title("density, logarithmic")
        _legend(figure, left)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)


def _densities(axes: Axes, panel: Marginal, weights: FloatArray, bins: int) -> None:
    finite = np.isfinite(panel.flow)
    of_each = np.repeat(weights, panel.terms)
    ends = [np.percentile(part, (_CENTRAL, 100.0 - _CENTRAL)) for part in (panel.md, panel.flow[finite])]
    edges = np.linspace(min(end[0] for end in ends), max(end[1] for end in ends), bins + 1)
    width = edges[1] - edges[0]
    # Normalised by everything, also by what lies beyond the axes.
    md = np.histogram(panel.md, edges)[0] / (panel.md.size * width)
    flow = np.histogram(panel.flow[finite], edges)[0] / (panel.flow.size * width)
    reweighted = np.histogram(panel.flow[finite], edges, weights=of_each[finite])[0] / (of_each.sum() * width)
    axes.stairs(md, edges, fill=True, color=MD, alpha=0.38, label="MD frames", linewidth=0)
    axes.stairs(flow, edges, color=FLOW, label="flow, as sampled", linewidth=1.3)
    axes.stairs(reweighted, edges, color=REWEIGHTED, label="flow, reweighted", linewidth=1.3, linestyle=(0, (3, 1.5)))
    axes.set_xlim(edges[0], edges[-1])
