"""A short training in float64 with every kind of stage, run under torchrun by a test: ``trained_together.py FOLDER``."""

import sys
from pathlib import Path

import torch

from flowbridge.core.training.processes import Processes, is_main_process
from flowbridge.flows.equivariant.fields.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow
from flowbridge.flows.equivariant.ordinary_equations import Solver
from flowbridge.flows.equivariant.path_training import PathGradientStage
from flowbridge.flows.equivariant.systems import DoubleWellParticles
from flowbridge.flows.equivariant.training import (
    ContinuousFlowTraining,
    FlowMatchingStage,
    LikelihoodStage,
    train_continuous_flow,
)

SETTINGS = ContinuousFlowTraining(
    matching=FlowMatchingStage(steps=4, batch=32, pool=64, group=4),
    likelihood=(LikelihoodStage(steps=3, batch=8, solver_steps=2, learning_rate=1e-3),),
    path=(PathGradientStage(steps=3, batch=8, solver_steps=2, learning_rate=1e-3, outlier=1.2),),
)


def main(folder: Path) -> None:
    system = DoubleWellParticles(3)
    samples = 2.0 * torch.randn(200, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    field = GraphFieldSettings(hidden=8, features=4, triangles=4, radial=12, longest=8.0)
    flow = EquivariantFlow.untrained(system, samples, field, Solver(steps=2), seed=2).flow.double()
    curves = train_continuous_flow(flow, samples, SETTINGS, folder, energy=system.reduced_energy, seed=1)
    if is_main_process():
        processes = Processes.of_this_training().number
        torch.save({"processes": processes, "parameters": flow.state_dict(), "curves": curves}, folder / "trained.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
