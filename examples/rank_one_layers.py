"""Couplings with trained linear layers between them, on eight modes of different weights.

    python examples/rank_one_layers.py [TRAINING_STEPS] [FIGURE]

Affine couplings transform one of two coordinates, so something has to exchange them: a permutation, or a linear layer that
begins as the permutation and is trained by perturbations of rank one. The merging schedule hangs on the optimiser; nothing else
changes.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from flowbridge.flows.transforms.bijection import Chain
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.linear_layer import InvertibleLinear
from flowbridge.flows.transforms.merging import MergingSchedule
from flowbridge.flows.transforms.sinh_arcsinh import Affine
from flowbridge.workflows.figure_style import drawn

SWAP = torch.eye(2).flip(0)


def modes(count: int, seed: int) -> torch.Tensor:
    """Return points ``(count, 2)`` of eight normal distributions on a circle, with weights in the ratio 1 : 2 : ... : 8."""
    generator = torch.Generator().manual_seed(seed)
    angle = 0.25 * math.pi * torch.multinomial(torch.arange(1.0, 9.0), count, replacement=True, generator=generator)
    return 2.0 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2, generator=generator)


def flow(trained: bool, seed: int = 0) -> Chain:
    """Return six couplings, each followed by an exchange of the coordinates that is trained or fixed."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number in range(6):
        swap = InvertibleLinear(2, seed=number, bias=False, matrix=SWAP)
        layers += [Coupling(2, [0], Affine(), (64, 64), generator), swap.requires_grad_(trained)]
    return Chain(layers)


def negative_log_likelihood(model: Chain, data: torch.Tensor) -> torch.Tensor:
    """Return the mean over ``data`` of minus the log-density."""
    latent, log_det = model.inverse(data)
    return (0.5 * latent.square().sum(-1) + math.log(2.0 * math.pi) - log_det).mean()


def main(steps: int = 2000, figure: str = "rank_one_layers.png") -> dict[str, float]:
    """Train both, print, draw; return the negative log-likelihoods of test data."""
    torch.set_num_threads(1)
    data, test = modes(20_000, seed=1), modes(20_000, seed=2)
    drawings, results = {"data": test}, {}
    for name, trained in (("permutations", False), ("trained linear layers", True)):
        model = flow(trained)
        couplings, swaps = model.bijections[::2], model.bijections[1::2]
        groups = [{"params": couplings.parameters()}]
        if trained:  # each direction has five steps only, so they are long
            groups.append({"params": swaps.parameters(), "lr": 2e-2})
        optimiser = torch.optim.Adam(groups, lr=2e-3)
        if trained:
            MergingSchedule(model, optimiser, every=5)
        generator = torch.Generator().manual_seed(3)
        for _ in range(steps):
            optimiser.zero_grad()
            negative_log_likelihood(model, data[torch.randint(len(data), (256,), generator=generator)]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
            optimiser.step()
        with torch.no_grad():
            model.eval()
            results[name] = float(negative_log_likelihood(model, test))
            drawings[name] = model(torch.randn(20_000, 2, generator=generator)).value
        print(f"{name}: negative log-likelihood {results[name]:.3f}")
    with drawn(Path(figure), 3.6) as canvas:
        for axis, (name, points) in zip(canvas.subplots(1, 3), drawings.items(), strict=True):
            counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=100, range=[[-2.8, 2.8], [-2.8, 2.8]])
            axis.imshow(np.sqrt(counts), origin="lower", cmap="BuPu", vmax=12.0)
            axis.set_title(name if name == "data" else f"{name}   NLL {results[name]:.2f}")
            axis.set_axis_off()
    print(f"figure in {figure}")
    return results


if __name__ == "__main__":
    main(*[int(word) if word.isdigit() else word for word in sys.argv[1:3]])
