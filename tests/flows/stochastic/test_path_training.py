"""Training of paths: it lowers the losses, and goes on after an interruption to the same numbers."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError, ModelFileError
from flowbridge.flows.stochastic.distributions import StandardNormal
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow, path_kullback_leibler, path_likelihood
from flowbridge.flows.stochastic.training import PathStage, train_paths
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.sinh_arcsinh import Affine

STAGES = [
    PathStage(30, 64, 1e-2),
    PathStage(30, 64, 1e-2, likelihood_weight=0.5, kullback_leibler_weight=0.5, gradient_norm=10.0),
]


def target(x):
    return (x[:, 0] ** 2 - 1.0) ** 2 / 0.2 + 0.5 * x[:, 1] ** 2


def flow(width=16) -> StochasticFlow:
    generator = torch.Generator().manual_seed(0)
    steps = []
    for transformed in (0, 1):
        steps.append(Coupling(2, [transformed], Affine(), (width,), generator))
        steps.append(MetropolisKernel(0.3, 3, learned=True))
    return StochasticFlow(StandardNormal(2), target, steps, learned_schedule=True)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 2, generator=generator)
    return torch.stack([x[:, 0].sign() + 0.2 * x[:, 0], x[:, 1]], 1)


@pytest.fixture(scope="module")
def whole(data):
    model = flow()
    return model, train_paths(model, data, STAGES, seed=3)


def test_losses_fall_and_the_schedule_and_the_steps_move(whole, data):
    model, _ = whole

    def bounds(one):
        generator = torch.Generator().manual_seed(0)
        return float(path_kullback_leibler(one, 4000, generator) + path_likelihood(one, data, generator))

    with torch.no_grad():
        assert bounds(model) < bounds(flow()) - 0.2
    assert float(model.steps[1].log_step.detach().exp()) != pytest.approx(0.3, abs=1e-4)
    assert float(model.schedule()[0].detach()) != pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("stop", [7, 30, 41])
def test_an_interrupted_training_ends_at_the_same_numbers(whole, data, tmp_path, stop):
    class Killed(Exception):
        pass

    def report(step, loss):
        if step == stop:
            raise Killed

    file = tmp_path / "training.checkpoint"
    with pytest.raises(Killed):
        train_paths(flow(), data, STAGES, 3, checkpoint=file, checkpoint_interval=5, report=report)
    steps = []
    model = flow()
    losses = train_paths(
        model, data, STAGES, 3, checkpoint=file, checkpoint_interval=5, report=lambda n, _: steps.append(n)
    )
    assert steps[0] == 5 * (stop // 5)
    assert losses == whole[1]
    for one, other in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_checkpoints_of_something_else_are_refused(data, tmp_path):
    file = tmp_path / "training.checkpoint"
    train_paths(flow(), data, STAGES[:1], 3, checkpoint=file)
    with pytest.raises(ConfigurationError, match=r"other settings \(seed 3 there, 4 now\)"):
        train_paths(flow(), data, STAGES[:1], 4, checkpoint=file)
    with pytest.raises(ModelFileError, match="another module"):
        train_paths(flow(width=8), data, STAGES[:1], 3, checkpoint=file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelFileError, match="no readable checkpoint"):
        train_paths(flow(), data, STAGES[:1], 3, checkpoint=file)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigurationError, match="needs data"):
        train_paths(flow(), None, STAGES, 0)
    with pytest.raises(ConfigurationError, match="weights of the losses"):
        PathStage(1, 1, likelihood_weight=0.0)
    with pytest.raises(ConfigurationError, match="positive"):
        PathStage(0, 1)
