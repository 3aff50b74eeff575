"""A stochastic normalizing flow crosses the barrier of a double well, and the weights of its paths make it exact.

    python examples/stochastic_flow.py [TRAINING_STEPS] [FIGURE]

Two flows of the same couplings are trained on data that hold both wells equally often, although one is six times as likely: one
of couplings alone, and one with Metropolis steps between them. Samples of both are drawn as they come, and reweighted. Needs
zuko (pip install 'flowbridge[flow-families]').
"""

import sys
from pathlib import Path

import numpy as np
import torch

from flowbridge.core.statistics.estimates import effective_sample_percent
from flowbridge.flows.stochastic.distributions import StandardNormal
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow
from flowbridge.flows.stochastic.training import PathStage, train_paths
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.splines import RationalQuadraticSpline
from flowbridge.workflows.figure_style import FLOW, REFERENCE, REWEIGHTED, drawn

EDGES = np.linspace(-2.4, 2.4, 49)


def energy(x: torch.Tensor) -> torch.Tensor:
    """Return the reduced energy ``(B,)`` of points ``(B, 2)``."""
    return -0.5 * x[:, 0] - 6.0 * x[:, 0] ** 2 + x[:, 0] ** 4 + 0.5 * x[:, 1] ** 2


def data(count: int, seed: int) -> torch.Tensor:
    """Return points of short Metropolis walks, half of them in each well."""
    start = torch.tensor([[-1.8, 0.0], [1.8, 0.0]]).repeat(count // 2, 1)
    walk = StochasticFlow(StandardNormal(2), energy, [MetropolisKernel(0.25, 200)])
    return walk.steps[0](start, walk.energies()[0], torch.Generator().manual_seed(seed)).value


def flow(kernels: bool, seed: int = 0) -> StochasticFlow:
    """Return three blocks of two spline couplings, each followed by twenty Metropolis steps, or by none."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(3):
        steps += [Coupling(2, [half], RationalQuadraticSpline(20, 4.0), (64, 64), generator) for half in (0, 1)]
        if kernels:
            steps.append(MetropolisKernel(0.25, 20))
    return StochasticFlow(StandardNormal(2), energy, steps)


def profile(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the free energy of each bin in kT, lowest at zero; NaN where nothing is."""
    counts = np.histogram(x, EDGES, weights=weights)[0]
    with np.errstate(divide="ignore"):
        free_energy = -np.log(counts)
    free_energy[~np.isfinite(free_energy)] = np.nan
    return free_energy - np.nanmin(free_energy)


def main(steps: int = 300, figure: str = "stochastic_flow.png", samples: int = 100_000) -> dict[str, float]:
    """Train both, print, draw; return the free energy of the left well relative to the right one, kT, by each flow."""
    torch.set_num_threads(1)
    frames = data(10_000, seed=1)
    stages = [
        PathStage(steps, 128, 5e-3),
        PathStage(steps, 128, 5e-3, likelihood_weight=0.5, kullback_leibler_weight=0.5),
    ]
    grid = np.linspace(EDGES[0], EDGES[-1], 20_001)
    boltzmann = np.exp(0.5 * grid + 6.0 * grid**2 - grid**4)
    exact = float(np.log(boltzmann[grid > 0.0].sum() / boltzmann[grid < 0.0].sum()))
    print(f"free energy of the left well: {exact:.2f} kT")
    drawings, results = {}, {}
    for name, kernels in (("couplings", False), ("couplings and Metropolis steps", True)):
        model = flow(kernels)
        train_paths(model, frames, stages, seed=0)
        paths = model.sample(samples, torch.Generator().manual_seed(1))
        points, weights = paths.value.numpy(), torch.softmax(paths.log_weights, 0).double().numpy()
        left = points[:, 0] < 0.0
        plain = float(np.log((~left).sum() / max(left.sum(), 1)))
        results[name] = float(np.log(weights[~left].sum() / weights[left].sum()))
        percent = effective_sample_percent(paths.log_weights.numpy())
        print(f"{name}: {plain:.2f} kT, reweighted {results[name]:.2f} kT, effective sample size {percent:.0f} %")
        drawings[name] = (points, weights)
    draw(Path(figure), drawings, profile(grid, boltzmann))
    return {"exact": exact, **results}


def draw(file: Path, drawings: dict[str, tuple[np.ndarray, np.ndarray]], exact: np.ndarray) -> None:
    """Draw samples of both flows above their free energies."""
    centres = 0.5 * (EDGES[1:] + EDGES[:-1])
    with drawn(file, 6.4) as figure:
        axes = figure.subplots(2, 2, sharex=True, height_ratios=(1.0, 1.3))
        for column, (name, (points, weights)) in enumerate(drawings.items()):
            above, below = axes[:, column]
            counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=(60, 120), range=[[-3.4, 3.4], [-2.6, 2.6]])
            above.imshow(np.log1p(counts), origin="lower", extent=(-2.6, 2.6, -3.4, 3.4), cmap="Blues", aspect="auto")
            above.set_title(name)
            below.plot(centres, exact, color=REFERENCE, label="exact")
            below.plot(centres, profile(points[:, 0], np.ones(len(points))), color=FLOW, label="as drawn")
            below.plot(centres, profile(points[:, 0], weights), ".", color=REWEIGHTED, label="reweighted")
            below.set_xlabel("$x_1$")
            below.set_ylim(-0.5, 13.0)
        axes[0, 0].set_ylabel("$x_2$")
        axes[1, 0].set_ylabel("free energy (kT)")
        axes[1, 0].legend(loc="upper center")
    print(f"figure in {file}")


if __name__ == "__main__":
    main(*[int(word) if word.isdigit() else word for word in sys.argv[1:3]])
