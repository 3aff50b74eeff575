"""Pictures of a density: a map through the molecule, the difference from a reference, and radial profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from ase.units import Bohr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .density.densities import DensityModel
from .molecule import Molecule
from .properties.properties import DensityProperties

Array = NDArray[np.float64]
_INK, _QUIET, _LINE = "#1d2126", "#5b626b", "#2f7fb5"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.0,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
}
_PIXELS = 161
_FARTHEST_PROFILE = 5.0  # bohr


def plane_of(molecule: Molecule) -> tuple[Array, Array, Array]:
    """Return the centre of the nuclei and two directions (bohr) that span their plane, or nearly so."""
    places = molecule.centers.numpy()
    middle = places.mean(0)
    _, strengths, axes = np.linalg.svd(places - middle, full_matrices=True)
    if len(places) == 1 or strengths[0] < 1e-6:
        return middle, np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
    first = axes[0] * np.sign(axes[0][np.argmax(np.abs(axes[0]))])
    second = axes[1] * np.sign(axes[1][np.argmax(np.abs(axes[1]))])
    return middle, first, second


def draw_density(
    file: Path, properties: DensityProperties, reference: DensityModel | None, title: str, reference_name: str = ""
) -> None:
    """Write a picture (PNG) of a density.

    Args:
        file: path of the picture.
        properties: properties of the density.
        reference: density to subtract in the second map; no second map where None.
        title: title of the figure.
        reference_name: name of the reference.
    """
    molecule, density = properties.molecule, properties.density
    middle, first, second = plane_of(molecule)
    relative = molecule.centers.numpy() - middle
    reach = 2.6
    spans = [
        (float((relative @ axis).min()) - reach, float((relative @ axis).max()) + reach) for axis in (first, second)
    ]
    half = max(spans[0][1] - spans[0][0], spans[1][1] - spans[1][0]) / 2.0
    centre = [sum(span) / 2.0 for span in spans]
    x = np.linspace(centre[0] - half, centre[0] + half, _PIXELS)
    y = np.linspace(centre[1] - half, centre[1] + half, _PIXELS)
    points = middle + x[None, :, None] * first + y[:, None, None] * second
    flat = torch.as_tensor(points.reshape(-1, 3))
    values = density.rho(flat).reshape(_PIXELS, _PIXELS).numpy()
    panels = 2 if reference is None else 3
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * panels + 0.4, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels)
        _draw_map(figure, axes[0], x, y, values, "density, e/Å³")
        if reference is not None:
            difference = values - reference.rho(flat).reshape(_PIXELS, _PIXELS).numpy()
            _draw_difference(figure, axes[1], x, y, difference, f"minus {reference_name}, e/Å³")
        for panel in axes[: panels - 1]:
            _draw_nuclei(panel, molecule, relative @ first, relative @ second)
        _draw_profile(axes[-1], properties)
        figure.suptitle(title, fontsize=11.0)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160, facecolor="white")


def _draw_map(figure: Figure, axes: Axes, x: Array, y: Array, values: Array, title: str) -> None:
    scaled = np.clip(values / Bohr**3, 1e-3, None)
    image = axes.pcolormesh(x * Bohr, y * Bohr, scaled, norm=LogNorm(1e-3, 30.0), cmap="Blues", rasterized=True)
    axes.contour(x * Bohr, y * Bohr, scaled, levels=[0.01, 0.03, 0.1, 0.3, 1, 3, 10], colors=_INK, linewidths=0.5)
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    axes.set_title(title)
    axes.set_aspect("equal")


def _draw_difference(figure: Figure, axes: Axes, x: Array, y: Array, values: Array, title: str) -> None:
    scaled = values / Bohr**3
    limit = max(0.05, float(np.quantile(np.abs(scaled), 0.999)))
    image = axes.pcolormesh(
        x * Bohr,
        y * Bohr,
        scaled,
        norm=SymLogNorm(1e-2, linscale=0.7, vmin=-limit, vmax=limit),
        cmap="RdBu_r",
        rasterized=True,
    )
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    axes.set_title(title)
    axes.set_aspect("equal")


def _draw_nuclei(axes: Axes, molecule: Molecule, x: Array, y: Array) -> None:
    for label, a, b in zip(molecule.labels(), x * Bohr, y * Bohr, strict=True):
        axes.plot([a], [b], marker="+", color=_INK, markersize=6, markeredgewidth=1.0)
        axes.annotate(label.rstrip("0123456789"), (a, b), (4, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("Å")
    axes.tick_params(labelsize=8)


def _draw_profile(axes: Axes, properties: DensityProperties) -> None:
    molecule = properties.molecule
    radii = np.linspace(0.0, _FARTHEST_PROFILE, 120)
    drawn: set[int] = set()
    colours = iter((_LINE, "#c8552f", "#2f9e83", "#a77fc0", "#8a9099"))
    for atom, number in enumerate(molecule.numbers):
        if number in drawn or len(drawn) == 5:
            continue
        drawn.add(number)
        found = properties.radial_density(atom, radii)
        shell = 4.0 * np.pi * radii**2
        colour = next(colours)
        name = molecule.labels()[atom].rstrip("0123456789")
        axes.plot(radii * Bohr, found.value * shell / Bohr, color=colour, label=f"about {name}", linewidth=1.4)
        axes.fill_between(
            radii * Bohr,
            (found.value - 3 * found.error) * shell / Bohr,
            (found.value + 3 * found.error) * shell / Bohr,
            color=colour, alpha=0.25, linewidth=0,
        )  # fmt: skip
    axes.set_title("radial density 4πr²ρ, e/Å (band: 3 sigma)")
    axes.set_xlabel("distance, Å")
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(0.0, _FARTHEST_PROFILE * Bohr)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
