"""Densities in the plane from pictures, and what flows with and without kernels make of them (experiment 2 of the paper)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow
from flowbridge.flows.stochastic.training import PathStage, train_paths
from flowbridge.flows.transforms.splines import RationalQuadraticSpline
from flowbridge.workflows.figure_style import drawn

from .double_well import plane_flow

SIZE = 160  # pixels along a side
EXTENT = 2.0  # the picture covers [-EXTENT, EXTENT] in both directions
_FLOOR = 2e-3  # of the brightest pixel: a density has to be positive everywhere
_BLOCKS, _BINS = 5, 20
_KERNEL_STEPS, _STEP = 10, 0.1


def text_image(text: str) -> NDArray[np.float64]:
    """Return ``(SIZE, SIZE)`` brightness in [0, 1] of a word in large letters; the first row is at the bottom."""
    figure = Figure(figsize=(1.0, 1.0), dpi=SIZE)
    canvas = FigureCanvasAgg(figure)
    size = 150.0 / (1.2 + len(text))
    figure.text(0.5, 0.47, text, ha="center", va="center", fontsize=size, family="DejaVu Sans", weight="bold")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba(), dtype=np.float64)[::-1, :, 0]
    return 1.0 - pixels / 255.0


def rings_image() -> NDArray[np.float64]:
    """Return ``(SIZE, SIZE)`` brightness of two linked rings, one brighter than the other, and two spots."""
    axis = np.linspace(-EXTENT, EXTENT, SIZE)
    x, y = np.meshgrid(axis, axis)
    first = np.exp(-0.5 * ((np.hypot(x + 0.55, y) - 0.85) / 0.07) ** 2)
    second = 0.5 * np.exp(-0.5 * ((np.hypot(x - 0.55, y) - 0.85) / 0.07) ** 2)
    spots = np.exp(-0.5 * (((np.abs(x) - 1.6) / 0.08) ** 2 + ((y - 1.4) / 0.08) ** 2))
    return np.asarray(np.maximum(np.maximum(first, second), spots))


SHAPES: dict[str, Callable[[], NDArray[np.float64]]] = {"letters": lambda: text_image("flow"), "rings": rings_image}


class ImageEnergy:
    """Minus the logarithm of a picture's brightness, interpolated between pixels, with walls of a parabola around it.

    Args:
        image: ``(SIZE, SIZE)`` brightness in [0, 1], the first row at the bottom.
    """

    def __init__(self, image: NDArray[np.float64]) -> None:
        self.image = image
        table = -np.log(_FLOOR + image)
        self._table = torch.as_tensor(table, dtype=torch.float32)[None, None]

    def __call__(self, value: Tensor) -> Tensor:
        """Return reduced energies ``(B,)`` of points ``(B, 2)``."""
        inside = functional.grid_sample(
            self._table.to(value.dtype), (value / EXTENT)[None, None], padding_mode="border", align_corners=True
        )
        outside = torch.relu(value.abs() - EXTENT)
        return inside[0, 0, 0] + 50.0 * outside.square().sum(-1) + 5.0 * outside.sum(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points ``(count, 2)``: a pixel by its brightness, and a place in it."""
        weights = torch.as_tensor(_FLOOR + self.image).reshape(-1)
        pixels = torch.multinomial(weights, count, replacement=True, generator=generator)
        corner = torch.stack([pixels % SIZE, pixels // SIZE], 1).float()
        shifted = corner + torch.rand(count, 2, generator=generator) - 0.5
        return (2.0 * shifted / (SIZE - 1) - 1.0) * EXTENT


def image_flow(energy: ImageEnergy, seed: int, *, kernels: bool) -> StochasticFlow:
    """Return an untrained flow of five blocks of two spline couplings, each followed by Metropolis kernels, or by none."""
    kernel = (lambda: MetropolisKernel(_STEP, _KERNEL_STEPS)) if kernels else None
    return plane_flow(energy, _BLOCKS, seed, lambda: RationalQuadraticSpline(_BINS, 3.0), kernel)


def draw_image_densities(
    folder: Path, shapes: tuple[str, ...], *, small: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Train both flows on both pictures, draw data and samples side by side into ``folder``, and return how good they are.

    ``divergence`` is ``KL(data | samples)`` over 80 x 80 cells, ``background`` the share of samples where the picture is dark.
    """
    steps, batch, count = (8, 64, 4000) if small else (300, 250, 100_000)
    results: dict[str, dict[str, dict[str, float]]] = {}
    panels: list[list[tuple[str, NDArray[np.float64]]]] = []
    for shape in shapes:
        energy = ImageEnergy(SHAPES[shape]())
        data = energy.sample(100_000, torch.Generator().manual_seed(1))
        reference = energy.sample(count, torch.Generator().manual_seed(2))
        results[shape], row = {}, [("picture", _cells(reference))]
        for kind, kernels in (("NSF", False), ("NSF + MC", True)):
            begin = time.monotonic()
            flow = image_flow(energy, 0, kernels=kernels)
            checkpoint = folder / f"{shape}-{kind}.checkpoint".replace(" ", "")
            train_paths(flow, data, [PathStage(steps, batch, 2e-3, gradient_norm=20.0)], 0, checkpoint=checkpoint)
            parts = [flow.sample(count // 10, torch.Generator().manual_seed(seed)).value for seed in range(10)]
            value = torch.cat(parts)
            cells = _cells(value)
            results[shape][kind] = {
                "divergence": _divergence(_cells(reference), cells),
                "background": float((energy(value) > -math.log(0.1)).float().mean()),
                "seconds": time.monotonic() - begin,
            }
            row.append((kind, cells))
        panels.append(row)
    _draw(folder / "image_densities.png", panels, results)
    return results


def _cells(value: Tensor) -> NDArray[np.float64]:
    counts, _, _ = np.histogram2d(
        value[:, 1].numpy(), value[:, 0].numpy(), bins=80, range=[[-EXTENT, EXTENT], [-EXTENT, EXTENT]]
    )
    return counts


def _divergence(data: NDArray[np.float64], model: NDArray[np.float64]) -> float:
    p, q = ((counts + 1.0) / (counts + 1.0).sum() for counts in (data, model))
    return float(np.sum(p * np.log(p / q)))


def _draw(
    file: Path, panels: list[list[tuple[str, NDArray[np.float64]]]], results: dict[str, dict[str, dict[str, float]]]
) -> None:
    with drawn(file, 0.2 + 3.4 * len(panels)) as figure:
        axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
        for row, (shape, cells_of) in enumerate(zip(results, panels, strict=True)):
            top = np.quantile(cells_of[0][1], 0.995)
            for column, (kind, cells) in enumerate(cells_of):
                axis = axes[row, column]
                axis.imshow(cells, origin="lower", cmap="BuPu", vmin=0.0, vmax=top, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set_visible(False)
                title = kind if kind == "picture" else f"{kind}   KL {results[shape][kind]['divergence']:.2f}"
                axis.set_title(title)
