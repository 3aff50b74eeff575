"""How all figures of a report look: one colour for one thing, light axes, a fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MD = "#8a9099"  # training data, force-field dynamics
FLOW = "#2f7fb5"  # samples of the flow, as drawn
DRIVEN = "#2f9e83"  # dynamics under the flow's energy
REWEIGHTED = "#c8552f"  # samples of the flow with their weights
REFERENCE = "#1d2126"
COMPARISON = "#a77fc0"  # the second architecture

WIDTH = 10.0  # inches; the page shows figures at this ratio of text to width
_RESOLUTION = 150
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.0,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#5b626b",
    "axes.labelcolor": "#2b3036",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": "#2b3036",
    "xtick.color": "#5b626b",
    "ytick.color": "#5b626b",
    "xtick.labelcolor": "#2b3036",
    "ytick.labelcolor": "#2b3036",
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.5,
    "mathtext.default": "regular",
}
_GREEK = {"phi": "φ", "psi": "ψ", "omega": "ω", "chi": "χ", "theta": "θ", "alpha": "α", "beta": "β", "gamma": "γ"}


@contextmanager
def drawn(file: Path, height: float) -> Iterator[Figure]:
    """Give a figure of ``height`` inches to draw on, and write it to ``file`` (PNG) at the end of the block."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=_RESOLUTION, facecolor="white")


def torsion_label(name: str) -> str:
    """Return the name of a torsion as chemists write it: ``phi`` as φ, ``chi1`` as χ1; others unchanged."""
    stem = name.rstrip("0123456789")
    return _GREEK.get(stem.lower(), stem) + name[len(stem) :]


def circular_axis(axes: Axes, name: str, vertical: bool = False) -> None:
    """Make an axis of ``axes`` one turn of the torsion ``name``, in degrees."""
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(range(-180, 181, 90))
    axis.set_label_text(f"{torsion_label(name)} (degrees)")
    (axes.set_ylim if vertical else axes.set_xlim)(-180.0, 180.0)


def quiet_counts(axes: Axes) -> None:
    """Hide the scale of a density, whose height carries no information of its own."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(bottom=0.0)
