"""Figures of a coarse-graining: surfaces side by side, native contacts, training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figure_style import DRIVEN, MD, REFERENCE, drawn, torsion_label
from .findings import Findings, SurfacePair

_HIGHEST = 6.0  # kT that a surface's colours reach
_LEVELS = np.arange(0.0, _HIGHEST + 0.1, 1.0)


CAPTIONS = {
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
"""Title and caption of each figure, in the order in which a report shows them."""


def draw_figures(found: Findings, trained: dict[str, Any], folder: Path) -> None:
    """Draw what was found to PNG files; the captions of their names are in :data:`CAPTIONS`."""
    for name, pair in found.surfaces.items():
        (_draw_surfaces if len(pair.names) == 2 else _draw_profile)(pair, folder / f"{name}.png")
    if found.contact_series is not None and found.contact_maps is not None:
        _draw_folding(found.contact_series, found.contact_maps, folder / "folding.png")
    if trained.get("curves"):
        _draw_curves(trained["curves"], "held_out_contrast_nats" in trained, folder / "training.png")


def _label(name: str) -> str:
    return torsion_label(name) if len(name) < 8 else name


def _draw_surfaces(pair: SurfacePair, file: Path) -> None:
    angular = np.isclose(pair.reference.edges[0][-1], np.pi)
    scale = 180.0 / np.pi if angular else 1.0
    edges = [scale * one for one in pair.reference.edges]
    with drawn(file, 4.4) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, surface, title in zip(
            panels, (pair.reference, pair.coarse), ("reference", "coarse-grained force field"), strict=True
        ):
            energy = np.where(surface.free_energy < _HIGHEST, surface.free_energy, np.nan)
            mesh = axes.pcolormesh(*edges, energy.T, cmap="viridis", vmin=0.0, vmax=_HIGHEST, rasterized=True)
            axes.set_title(title)
            axes.set_xlabel(_label(pair.names[0]) + (" (degrees)" if angular else ""))
            if angular:
                axes.set_xticks(range(-180, 181, 90))
                axes.set_yticks(range(-180, 181, 90))
        panels[0].set_ylabel(_label(pair.names[1]) + (" (degrees)" if angular else ""))
        figure.colorbar(mesh, ax=panels, label="free energy (kT)", shrink=0.9, ticks=_LEVELS)


def _draw_profile(pair: SurfacePair, file: Path) -> None:
    edges = pair.reference.edges[0]
    angular = np.isclose(edges[-1], np.pi)
    centres = 0.5 * (edges[1:] + edges[:-1]) * (180.0 / np.pi if angular else 1.0)
    with drawn(file, 3.6) as figure:
        panels = figure.subplots(1, 2)
        for surface, colour, label in (
            (pair.reference, REFERENCE, "reference"),
            (pair.coarse, DRIVEN, "coarse-grained force field"),
        ):
            panels[0].plot(centres, surface.probabilities / np.diff(edges), color=colour, label=label)
            panels[1].plot(centres, surface.free_energy, color=colour, label=label)
        for axes, what in zip(panels, ("density", "free energy (kT)"), strict=True):
            axes.set_xlabel(_label(pair.names[0]) + (" (degrees)" if angular else ""))
            axes.set_ylabel(what)
            axes.set_ylim(bottom=0.0)
        panels[0].legend()


def _draw_folding(series: Any, maps: tuple[Any, Any], file: Path) -> None:
    with drawn(file, 3.8) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
        left.plot(series[0], color=DRIVEN, linewidth=0.7)
        left.set_xlabel("frame of one replica")
        left.set_ylabel("fraction of native contacts")
        left.set_ylim(0.0, 1.0)
        # One map above the diagonal, the other below it.
        both = np.triu(maps[0], 1) + np.tril(maps[1], -1)
        np.fill_diagonal(both, np.nan)
        image = right.imshow(both, origin="lower", cmap="viridis", vmin=0.0, vmax=1.0)
        right.set_title("contacts: reference above, coarse below")
        right.set_xlabel("bead")
        right.set_ylabel("bead")
        figure.colorbar(image, ax=right, label="share of frames", shrink=0.9)


def _draw_curves(curves: dict[str, list[dict[str, float]]], contrasted: bool, file: Path) -> None:
    student = "force error (relative) and contrast" if contrasted else "force error (relative)"
    with drawn(file, 3.2) as figure:
        panels = _row(figure, len(curves))
        for axes, (name, points) in zip(panels, curves.items(), strict=True):
            for key, colour, label in (("loss", MD, "a batch"), ("held_out", REFERENCE, "held out")):
                chosen = [(point["step"], point[key]) for point in points if key in point]
                if chosen:
                    axes.plot(*zip(*chosen, strict=True), color=colour, label=label)
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.set_ylabel("negative log-likelihood" if name == "teacher" else student)
            axes.legend()


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(np.atleast_1d(figure.subplots(1, count)))
