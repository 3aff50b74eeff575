"""Flow matching, maximum likelihood and path gradients, in a size of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowbridge.core.errors import ConfigurationError, ConvergenceError
from flowbridge.core.training.processes import Processes
from flowbridge.flows.equivariant.fields.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.fields.kernel_field import KernelFieldSettings
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow
from flowbridge.flows.equivariant.ordinary_equations import Solver
from flowbridge.flows.equivariant.path_training import PathGradientStage, PathGradientTraining
from flowbridge.flows.equivariant.replica_exchange import ReplicaExchange, ReplicaExchangeSettings
from flowbridge.flows.equivariant.systems import DoubleWellParticles
from flowbridge.flows.equivariant.training import (
    ContinuousFlowTraining,
    ContinuousLikelihoodTraining,
    FlowMatchingStage,
    LikelihoodStage,
    train_continuous_flow,
)

MATCHING = FlowMatchingStage(steps=150, batch=128, learning_rate=1e-2, pool=512, group=4, average=0.95)
LIKELIHOOD = LikelihoodStage(steps=25, batch=64, solver_steps=4, learning_rate=1e-2, average=0.8)


@pytest.fixture(scope="module")
def pair():
    """Two particles in a double well: the system, training samples and test samples."""
    system = DoubleWellParticles(2)
    settings = ReplicaExchangeSettings(
        chains=100, temperatures=(1.0, 2.0, 4.0), leapfrog_steps=6, equilibration=60, thinning=4, frames=30
    )
    x = ReplicaExchange(system, settings, seed=1).run()
    return system, x[:2500], x[2500:]


def untrained(pair, field=None) -> EquivariantFlow:
    system, samples, _ = pair
    field = field or GraphFieldSettings(hidden=16, radial=16, longest=8.0, crowding=1.0)
    return EquivariantFlow.untrained(system, samples, field, Solver(steps=6), seed=2)


def test_flow_matching_and_likelihood_learn(pair, tmp_path):
    """From the normal distribution half way and more to the entropy, both by matching and by likelihood alone."""
    system, samples, test = pair
    model = untrained(pair)
    before = -model.flow.log_prob(test).mean().item()
    settings = ContinuousFlowTraining(matching=MATCHING)
    curves = train_continuous_flow(model.flow, samples, settings, tmp_path / "matching", seed=1)
    after = -model.flow.log_prob(test).mean().item()
    grid = torch.linspace(1e-3, 9.0, 4000, dtype=torch.float64)
    weight = grid * torch.exp(-system.pair_term(grid).energy)
    partition = weight.sum() * (grid[1] - grid[0]) * torch.pi  # of x = (r, -r) / 2: area 2 pi d dd / 2
    entropy = (partition.log() + (weight * system.pair_term(grid).energy).sum() / weight.sum()).item()
    assert entropy - 0.05 < after < entropy + 0.4 * (before - entropy)
    assert curves["matching"][-1]["squared_error"] < curves["matching"][0]["squared_error"]

    model = untrained(pair, KernelFieldSettings(distances=16, times=4))
    settings = ContinuousFlowTraining(matching=FlowMatchingStage(steps=0), likelihood=(LIKELIHOOD,))
    curves = train_continuous_flow(model.flow, samples, settings, tmp_path / "likelihood", seed=1)
    assert entropy - 0.05 < -model.flow.log_prob(test).mean().item() < entropy + 0.7 * (before - entropy)
    assert curves["likelihood-1"][0]["nll"] == pytest.approx(before, abs=0.3)


def test_path_gradients_learn(pair, tmp_path):
    """From a normal distribution towards the target; more slowly than likelihood where that is far, hence a larger limit."""
    system, samples, test = pair
    model = untrained(pair)
    before = -model.flow.log_prob(test).mean().item()
    stage = PathGradientStage(steps=40, batch=64, solver_steps=3, learning_rate=1e-2, average=0.8)
    settings = ContinuousFlowTraining(matching=FlowMatchingStage(steps=0), path=(stage,))
    curves = train_continuous_flow(model.flow, samples, settings, tmp_path, energy=system.reduced_energy, seed=1)
    assert -model.flow.log_prob(test).mean().item() < before - 0.3
    assert curves["path-1"][-1]["pull"] < 0.7 * curves["path-1"][0]["pull"]


def test_path_gradients_vanish_where_the_flow_is_right(pair):
    """Sample by sample, where those of the likelihood are noise: the untrained flow is at rest, its target the prior."""
    model = untrained(pair)
    prior = model.flow.prior
    samples = prior.sample(256, torch.Generator().manual_seed(0))
    stage = PathGradientStage(steps=1, batch=32)
    path = PathGradientTraining(model.flow, stage, samples, lambda x: -prior.log_prob(x), 1, 25)
    path.loss(path.stream()).backward()
    assert max(parameter.grad.abs().max() for parameter in model.flow.parameters()) < 1e-4
    likelihood = ContinuousLikelihoodTraining(model.flow, LIKELIHOOD, samples, 1, 25)
    model.flow.zero_grad()
    likelihood.loss(likelihood.stream()).backward()
    assert max(parameter.grad.abs().max() for parameter in model.flow.parameters()) > 1e-2


def test_interrupted_training_gives_the_same_parameters(pair, tmp_path):
    """With pools of lines that change between checkpoints."""
    settings = ContinuousFlowTraining(
        matching=MATCHING.model_copy(update={"steps": 30, "pool": 256, "pool_uses": 2}),
        likelihood=(LIKELIHOOD.model_copy(update={"steps": 4}),) * 2,
        path=(PathGradientStage(steps=4, batch=16, solver_steps=2),),
        checkpoint_interval=10,
    )
    energy = pair[0].reduced_energy
    whole = untrained(pair)
    train_continuous_flow(whole.flow, pair[1], settings, tmp_path / "whole", energy=energy, seed=1)

    class Stop(Exception):
        pass

    stopped = untrained(pair)
    forward, calls = stopped.flow.field.forward, 0

    def failing(time, x):
        nonlocal calls
        calls += 1
        if calls > 17:
            raise Stop
        return forward(time, x)

    stopped.flow.field.forward = failing
    with pytest.raises(Stop):
        train_continuous_flow(stopped.flow, pair[1], settings, tmp_path / "parts", energy=energy, seed=1)
    resumed = untrained(pair)
    train_continuous_flow(resumed.flow, pair[1], settings, tmp_path / "parts", energy=energy, seed=1)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_diverged_training_says_so(pair, tmp_path):
    model = untrained(pair)
    with torch.no_grad():
        next(model.flow.field.parameters()).fill_(float("nan"))
    with pytest.raises(ConvergenceError, match="learning rate"):
        train_continuous_flow(model.flow, pair[1], ContinuousFlowTraining(matching=MATCHING), tmp_path)


def test_hostile_input(pair, tmp_path):
    model = untrained(pair)
    with pytest.raises(ValueError, match="finite"):
        train_continuous_flow(model.flow, torch.zeros(10, 3, 2), ContinuousFlowTraining(), tmp_path)
    with pytest.raises(ValueError, match="finite"):
        train_continuous_flow(model.flow, torch.full((10, 2, 2), torch.nan), ContinuousFlowTraining(), tmp_path)
    blind = ContinuousFlowTraining(path=(PathGradientStage(),))
    with pytest.raises(ConfigurationError, match="reduced energy"):
        train_continuous_flow(model.flow, torch.zeros(10, 2, 2), blind, tmp_path)
    wrong = ContinuousFlowTraining(matching=MATCHING.model_copy(update={"pool": 130}))
    with pytest.raises(ConfigurationError, match="pool"):
        train_continuous_flow(model.flow, pair[1], wrong, tmp_path)


def test_two_processes_train_as_one(tmp_path):
    """Each takes half of every batch; in all stages the mean of their gradients is that of the whole batch."""
    trained = [trained_by(number, tmp_path / str(number)) for number in (1, 2)]
    assert [result["processes"] for result in trained] == [1, 2]
    one, two = (result["parameters"] for result in trained)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert one["field.weight"].abs().max() > 1e-3  # it starts at zero


def trained_by(processes: int, folder: Path) -> dict:
    folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = Path(__file__).with_name("trained_together.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "trained.pt")


def test_processes_refuse_batches_that_they_cannot_share():
    together = Processes(number=3, here=3)
    together.require_equal_shares({"matching.batch": 96, "path.0.batch": None})
    with pytest.raises(
        ConfigurationError, match=r"3 processes cannot share batches of 64.*training.path.0.batch a multiple"
    ):
        together.require_equal_shares({"matching.batch": 96, "path.0.batch": 64})
