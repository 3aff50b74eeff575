"""The report of a coarse-graining: one HTML file with its figures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_CAPTIONS = {
    "torsions": (
        "Free energy of torsions",
        "From the reference frames, weighted where they were biased, and from the simulation of the coarse-grained force "
        "field. White bins were not visited, or lie above 6 kT.",
    ),
    "native_contacts": ("Native contacts", "Density and free energy of the fraction of native contacts."),
    "folding": (
        "Folding",
        "One replica of the coarse-grained simulation in time, and how often two beads are in contact.",
    ),
    "slow_coordinates": (
        "Slow coordinates",
        "Free energy on the two slowest linear combinations of pair distances (time-lagged independent components of the "
        "reference).",
    ),
    "training": (
        "Training",
        "The error of forces is relative to forces of zero; what it levels off at is the noise of the labels.",
    ),
}


def write_report(results: Mapping[str, Any], figures: Mapping[str, Path], file: Path) -> None:
    """Write the report.

    Args:
        results: what ``results.json`` holds.
        figures: PNG files by name.
        file: of the report.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flowbridge.workflows.coarse_graining", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = [
        {"title": _CAPTIONS[name][0], "caption": _CAPTIONS[name][1], "source": _inlined(path)}
        for name, path in figures.items()
    ]
    numbers = [(name.replace("_", " "), _number(value)) for name, value in results.items() if _is_number(value)]
    numbers += [(f"seconds of {name}", f"{value:.0f}") for name, value in results["wall_seconds"].items()]
    text = environment.get_template("report.html").render(results=results, figures=shown, numbers=numbers)
    file.write_text(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _inlined(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
