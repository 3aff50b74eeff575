"""Train on data that may not leak, and see what the guarantee costs.

    python examples/private_training.py [runs/private_training]

Networks learn scikit-learn's digits by DP-MAC and DP-SGD within budgets of epsilon; nobody who sees a model can tell, beyond
its budget, whether any one digit was among the data. Autoencoders show the same price as pictures. The models, with their
ledgers, and a figure are in the folder; `flowbridge info` prints a ledger. Needs opacus and scikit-learn (pip install
'flowbridge[private]'); a minute or two on one core.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import flowbridge
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.feed_forward import FeedForwardConfiguration, FeedForwardNetwork
from flowbridge.forcefields.private.ledger import PrivacyLedger
from flowbridge.forcefields.private.training import train_privately
from flowbridge.forcefields.private.units import UnitData
from flowbridge.workflows.figure_style import DRIVEN, FLOW, drawn

DELTA, HELD_OUT = 1e-5, 360
METHODS = {"dp_mac": ("DP-MAC", FLOW), "dp_sgd": ("DP-SGD", DRIVEN)}


def network(widths: tuple[int, ...], task: str, activation: str) -> FeedForwardNetwork:
    """An untrained network. The inputs are centred by a constant, not by the mean of the data, which would be on the ledger."""
    model = FeedForwardNetwork(FeedForwardConfiguration(inputs=64, widths=widths, task=task, activation=activation))
    model.standardise(torch.full((64,), 0.3), torch.eye(64))
    return model


def train(
    model: FeedForwardNetwork, inputs: torch.Tensor, targets: torch.Tensor, epsilon: float, settings: PrivateTraining
) -> PrivacyLedger:
    """Train within the budget; sampling and noise come from the operating system's cryptographic generator."""
    data = UnitData(inputs, targets, unit="digit")
    return train_privately(model, data, PrivacyBudget(epsilon=epsilon, delta=DELTA), settings).ledger


def main(
    output: str | Path = "runs/private_training",
    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0),
    steps: int = 100,
) -> dict[str, list[float]]:
    """Train, save, draw; returns test accuracies by method and epsilon."""
    torch.set_num_threads(1)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pixels, digits = load_digits(return_X_y=True)
    inputs, digits = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(digits)
    accuracies: dict[str, list[float]] = {method: [] for method in METHODS}
    for epsilon in epsilons:
        for method, (name, _) in METHODS.items():
            model = network((64, 64, 10), "classification", "relu")
            settings = PrivateTraining(method=method, steps=steps, batch=256, learning_rate=0.05, average=0.9)
            ledger = train(model, inputs[HELD_OUT:], digits[HELD_OUT:], epsilon, settings)
            right = (model.predict(inputs[:HELD_OUT]).argmax(1) == digits[:HELD_OUT]).float().mean()
            accuracies[method].append(100.0 * float(right))
            flowbridge.save(model, folder / f"{method}-{epsilon:g}.flow")
            print(f"{name}: {accuracies[method][-1]:.1f} % right with {ledger.sentence}")
    pictures = {"digits": inputs[:8]}
    for epsilon in (epsilons[0], epsilons[-1]):
        model = network((64, 48, 16, 48, 64), "regression", "tanh")
        settings = PrivateTraining(method="dp_mac", steps=steps, batch=256, learning_rate=0.015, average=0.9)
        train(model, inputs[HELD_OUT:], inputs[HELD_OUT:], epsilon, settings)
        pictures[f"ε = {epsilon:g}"] = model.predict(inputs[:8]).detach()
    draw(folder / "private_training.png", epsilons, accuracies, pictures)
    return accuracies


def draw(
    file: Path, epsilons: tuple[float, ...], accuracies: dict[str, list[float]], pictures: dict[str, torch.Tensor]
) -> None:
    """Accuracies on the left, digits through private autoencoders on the right."""
    with drawn(file, 3.8) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.15))
        axes = left.subplots()
        for method, (name, colour) in METHODS.items():
            axes.plot(epsilons, accuracies[method], "o-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.set_xlabel("ε: the larger, the less private")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(f"digits classified, δ = {DELTA:g}")
        axes.legend(loc="lower right")
        rows = right.subplots(len(pictures), 1)
        for panel, (name, images) in zip(np.atleast_1d(rows), pictures.items(), strict=True):
            strip = np.concatenate([np.pad(image.reshape(8, 8), 1) for image in images.numpy()], axis=1)
            panel.imshow(strip, cmap="Greys", vmin=0.0, vmax=1.0)
            panel.set_axis_off()
            panel.set_title(name if name == "digits" else f"through a DP-MAC autoencoder, {name}")
    print(f"figure in {file}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
