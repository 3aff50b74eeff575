"""The figure of the comparison on capped alanine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flowbridge.workflows.figure_style import COMPARISON, DRIVEN, FLOW, MD, REWEIGHTED, drawn

_LOOK = {
    "flow_matching": (DRIVEN, "o", "flow-matching (positions only)"),
    "flow_matching_with_contrast": (FLOW, "D", "flow-matching with noise-contrastive estimation (positions only)"),
    "force_matching": (REWEIGHTED, "s", "force matching"),
    "histogram": (MD, "^", "histogram of the same frames"),
    "prior": (COMPARISON, "x", "prior without a network"),
}


def draw_learning_curves(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw mean square errors of the free-energy surface against the number of frames."""
    with drawn(file, 4.2) as figure:
        axes = figure.subplots()
        for name, points in curves.items():
            colour, marker, label = _LOOK[name]
            sizes = [point["frames"] for point in points]
            errors = np.nan_to_num([point["error"] for point in points])
            values = [point["mean_square_error"] for point in points]
            axes.errorbar(sizes, values, errors, color=colour, marker=marker, label=label, capsize=3.0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training frames")
        axes.set_ylabel("mean square free-energy error (kT²)")
        axes.legend()
