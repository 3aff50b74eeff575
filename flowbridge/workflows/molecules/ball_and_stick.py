"""Three-dimensional pictures of molecules as SVG: balls and sticks, seen along the shortest axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...flows.molecules.bonds import Bond

_COLOURS = {1: "#f2f2f2", 6: "#5a5f66", 7: "#3566d6", 8: "#d93a3a", 9: "#4fae5a"}
_RADII = {1: 0.022, 6: 0.034, 7: 0.033, 8: 0.032, 9: 0.030}  # nm on the picture
_OTHER_COLOUR, _OTHER_RADIUS = "#c080c0", 0.034
_STICK, _BESIDE = 0.011, 0.017  # nm: width of a stick, distance between sticks of a multiple bond
_TILT = (0.35, 0.25)  # radians, so that flat molecules do not look like drawings
_MARGIN = 0.05


def draw(
    numbers: Sequence[int], positions: NDArray[np.float64], bonds: Sequence[Bond], width: int = 200, height: int = 150
) -> str:
    """Return a picture to stand within HTML.

    Args:
        numbers: ``(N,)`` atomic numbers.
        positions: ``(N, 3)`` in nm.
        bonds: with orders, which are drawn as that many sticks.
        width: in pixels.
        height: in pixels.
    """
    seen = _seen(np.asarray(positions, dtype=float))
    low, high = seen[:, :2].min(0) - _MARGIN, seen[:, :2].max(0) + _MARGIN
    scale = min(width / (high[0] - low[0]), height / (high[1] - low[1]), 420.0)
    centre = 0.5 * (low + high)
    depth = seen[:, 2]
    near = 1.0 + 0.9 * (depth - depth.mean())  # perspective: 9 % larger for each 0.1 nm
    places = (seen[:, :2] - centre) * scale * near[:, None] ** 0.5 + np.array([width, height]) / 2
    shapes: list[tuple[float, str]] = []
    for i, j, order in bonds:
        shapes.append((float(depth[i] + depth[j]) / 2 - 1e-3, _sticks(places[i], places[j], order, scale)))
    for atom, number in enumerate(numbers):
        x, y = places[atom]
        radius = _RADII.get(int(number), _OTHER_RADIUS) * scale * near[atom]
        ball = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="url(#z{int(number)})" '
            'stroke="#333" stroke-width="0.6"/>'
        )
        shapes.append((float(depth[atom]), ball))
    body = "".join(shape for _, shape in sorted(shapes, key=lambda entry: entry[0]))
    gradients = "".join(_gradient(number) for number in sorted({int(number) for number in numbers}))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<defs>{gradients}</defs>{body}</svg>"
    )


def _seen(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn the longest axis to the right and the shortest to the eye, a little tilted."""
    centred = positions - positions.mean(0)
    axes = np.linalg.svd(centred, full_matrices=True)[2]
    axes[2] = np.cross(axes[0], axes[1])
    a, b = _TILT
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turned: NDArray[np.float64] = centred @ axes.T @ about_x.T @ about_y.T
    return turned


def _sticks(start: NDArray[np.float64], end: NDArray[np.float64], order: int, scale: float) -> str:
    along = end - start
    across = np.array([-along[1], along[0]]) / max(float(np.linalg.norm(along)), 1e-9) * _BESIDE * scale
    thickness = _STICK * scale * (1.0 if order == 1 else 0.75)
    lines = []
    for number in range(order):
        shift = across * (number - 0.5 * (order - 1))
        (x1, y1), (x2, y2) = start + shift, end + shift
        lines.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#8a8f98" '
            f'stroke-width="{thickness:.1f}" stroke-linecap="round"/>'
        )
    return "".join(lines)


def _gradient(number: int) -> str:
    colour = _COLOURS.get(number, _OTHER_COLOUR)
    return (
        f'<radialGradient id="z{number}" cx="0.35" cy="0.35" r="0.75"><stop offset="0" stop-color="#fff"/>'
        f'<stop offset="0.45" stop-color="{colour}"/><stop offset="1" stop-color="{colour}"/></radialGradient>'
    )
