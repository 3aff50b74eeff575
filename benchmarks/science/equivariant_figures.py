"""Distances and energies of samples of trained flows, with and without weights, over those of replica exchange."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from flowbridge.flows.equivariant.systems import ParticleSystem
from flowbridge.workflows.figure_style import FLOW, MD, REWEIGHTED, drawn

FloatArray = NDArray[np.float64]


class Compared(NamedTuple):
    """A system with reference samples ``(R, N, D)``, samples of its flow ``(S, N, D)`` and their log-weights ``(S,)``."""

    name: str
    system: ParticleSystem
    reference: Tensor
    samples: Tensor
    log_weights: FloatArray
    effective_percent: float


def draw_samples(one: Compared, file: Path) -> None:
    """Draw distances of pairs on the left, energies on the right."""
    with drawn(file, 2.9) as figure:
        distances, energies = figure.subplots(1, 2)
        weights = np.exp(one.log_weights - one.log_weights.max())
        reference, found = _distances(one.reference), _distances(one.samples)
        edges = np.linspace(*np.quantile(reference, (1e-5, 0.9999)), 70)
        _histograms(distances, edges, reference.ravel(), found.ravel(), np.repeat(weights, found.shape[1]))
        distances.set_xlabel("distance of pairs (reduced)")
        distances.set_title(one.name)
        distances.legend(loc="upper center")
        reference, found = (one.system.reduced_energy(x.double()).numpy() for x in (one.reference, one.samples))
        low, high = np.quantile(reference, (5e-4, 0.9995))
        edges = np.linspace(low - 0.1 * (high - low), high + 0.4 * (high - low), 55)
        _histograms(energies, edges, reference, found, weights)
        energies.set_xlabel("energy (kT)")
        energies.set_title(f"effective sample size {one.effective_percent:.0f} %")


def _distances(x: Tensor) -> FloatArray:
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1)
    result: FloatArray = (x[:, first] - x[:, second]).double().norm(dim=-1).numpy()
    return result


def _histograms(axes: Axes, edges: FloatArray, reference: FloatArray, found: FloatArray, weights: FloatArray) -> None:
    heights = _heights(reference, edges, np.ones(len(reference)))
    axes.stairs(heights, edges, color=MD, fill=True, alpha=0.35, label="replica exchange")
    axes.stairs(_heights(found, edges, np.ones(len(found))), edges, color=FLOW, linewidth=1.4, label="flow")
    axes.stairs(_heights(found, edges, weights), edges, color=REWEIGHTED, linewidth=1.4, label="flow, reweighted")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(bottom=0.0, top=1.35 * heights.max())


def _heights(values: FloatArray, edges: FloatArray, weights: FloatArray) -> FloatArray:
    """Return densities: what lies outside the edges counts in the whole."""
    inside = np.isfinite(values)
    counts, _ = np.histogram(values[inside], edges, weights=weights[inside])
    result: FloatArray = counts / (weights.sum() * np.diff(edges))
    return result
