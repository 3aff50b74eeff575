"""Four particles in the plane that prefer two distances: a flow that knows their symmetries, from samples to weights.

    python examples/equivariant_flow.py [FOLDER]

Reference samples of DW4 by replica exchange, a graph-network flow trained on them by optimal-transport flow matching and then
by path gradients, its own samples with importance weights, and a figure, in four minutes on one core. FOLDER
(runs/equivariant_flow) keeps the model file, the weighted samples and the figure; the model file works in OpenMM and ASE like
any other.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

import flowbridge as fb
from flowbridge.flows.equivariant.fields.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow
from flowbridge.flows.equivariant.ordinary_equations import Solver
from flowbridge.flows.equivariant.path_training import PathGradientStage
from flowbridge.flows.equivariant.replica_exchange import ReplicaExchange, ReplicaExchangeSettings, virial
from flowbridge.flows.equivariant.systems import DoubleWellParticles
from flowbridge.flows.equivariant.training import ContinuousFlowTraining, FlowMatchingStage, train_continuous_flow
from flowbridge.workflows.figure_style import FLOW, MD, REFERENCE, REWEIGHTED, drawn

FOLDER = Path("runs/equivariant_flow")
PARTICLES = ("#2f7fb5", "#c8552f", "#2f9e83", "#a77fc0")


def main(
    folder: Path = FOLDER, equilibration: int = 300, frames: int = 100, steps: int = 2000, draws: int = 5000
) -> float:
    """Run everything; return the effective sample size in percent."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    system = DoubleWellParticles()
    settings = ReplicaExchangeSettings(
        temperatures=(1.0, 1.5, 2.2, 3.2), leapfrog_steps=8, equilibration=equilibration, frames=frames, spread=2.0
    )
    samples = ReplicaExchange(system, settings, seed=1).run(folder / "reference")
    value, error = virial(system, samples)
    print(f"{len(samples)} reference samples, virial {value:.2f} +- {error:.2f} (6 in equilibrium)")

    field = GraphFieldSettings(hidden=32, radial=32, longest=10.0, crowding=1.0)
    model = EquivariantFlow.untrained(system, samples, field, Solver(steps=10))
    training = ContinuousFlowTraining(
        matching=FlowMatchingStage(steps=steps),
        path=(PathGradientStage(steps=steps // 8, learning_rate=3e-3, average=0.95),),
    )
    train_continuous_flow(model.flow, samples, training, folder / "training", energy=system.reduced_energy, seed=1)
    fb.save(model, folder / "dw4.flow")

    weighted = model.sample(draws, system, seed=2)
    weighted.save(folder / "dw4.h5")
    print(f"{draws} samples of the flow, effective sample size {weighted.effective_sample_percent():.1f} % (unclipped)")
    draw_figure(folder / "dw4.png", system, model, samples, weighted)
    return weighted.effective_sample_percent()


def pair_distances(x: np.ndarray) -> np.ndarray:
    """Return all distances ``(S, 6)`` of positions ``(S, 4, 2)``."""
    first, second = np.triu_indices(4, 1)
    return np.linalg.norm(x[:, first] - x[:, second], axis=-1)


def draw_figure(
    file: Path, system: DoubleWellParticles, model: EquivariantFlow, samples: torch.Tensor, weighted: fb.WeightedSamples
) -> None:
    """Draw how the flow carries particles, and distances and energies with and without weights."""
    x = weighted.positions[..., :2] / system.length
    weights = weighted.weights
    with drawn(file, 3.6) as figure:
        paths, distances, energies = figure.subplots(1, 3, width_ratios=(1.0, 1.1, 1.1))
        draw_paths(paths, model)
        bins = np.linspace(0.5, 7.5, 71)
        energy = system.reduced_energy(torch.from_numpy(x)).numpy()
        reference = system.reduced_energy(samples).numpy()
        energy_bins = np.linspace(reference.min() - 0.5, np.quantile(reference, 0.999) + 4.0, 45)
        for axes, of_reference, of_flow, edges, repeat in (
            (distances, pair_distances(samples.numpy()).ravel(), pair_distances(x).ravel(), bins, 6),
            (energies, reference, energy, energy_bins, 1),
        ):
            heights, _ = np.histogram(of_reference, edges, density=True)
            axes.stairs(heights, edges, color=MD, fill=True, alpha=0.35, label="replica exchange")
            heights, _ = np.histogram(of_flow, edges, density=True)
            axes.stairs(heights, edges, color=FLOW, linewidth=1.4, label="flow")
            heights, _ = np.histogram(of_flow, edges, density=True, weights=np.repeat(weights, repeat))
            axes.stairs(heights, edges, color=REWEIGHTED, linewidth=1.4, label="flow, reweighted")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_ylim(bottom=0.0, top=1.3 * axes.get_ylim()[1])
        distances.set_xlabel("distance of pairs (reduced)")
        energies.set_xlabel("energy (kT)")
        distances.legend(loc="upper left", ncols=1)
        energies.set_title(f"effective sample size {weighted.effective_sample_percent():.0f} %")
    print(f"figure: {file}")


def draw_paths(axes: Axes, model: EquivariantFlow, shown: int = 4) -> None:
    """Draw particles of a few points of the prior on their way to data."""
    steps = 100
    x = model.flow.prior.sample(shown, torch.Generator().manual_seed(4), model.flow.dtype)
    path = [x]
    with torch.no_grad():
        for number in range(steps):  # small enough for the eye; samples are made by the solver of order 4
            path.append(path[-1] + model.flow.field(torch.tensor((number + 0.5) / steps), path[-1]) / steps)
    places = 8.0 * np.array([[number % 2, -(number // 2)] for number in range(shown)])
    lines = torch.stack(path).numpy() + places[:, None]
    for configuration in range(shown):
        for particle, color in enumerate(PARTICLES):
            line = lines[:, configuration, particle]
            axes.plot(line[:, 0], line[:, 1], color=color, linewidth=1.4, alpha=0.8)
            axes.plot(*line[0], "o", color="white", markeredgecolor=color, markersize=5)
            axes.plot(*line[-1], "o", color=color, markersize=8)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title("from the prior (open) to data (full)", color=REFERENCE)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
