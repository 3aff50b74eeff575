"""The training loop by itself: known answers, what is restored after an interruption, what is refused."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from flowbridge.core.errors import ConfigurationError, ConvergenceError, ModelFileError
from flowbridge.core.training.objective import CosineStage, Objective, Plan, StageObjective, cosine, warming_up
from flowbridge.core.training.trainer import Trainer, train

STAGE = CosineStage(steps=40, batch=8, learning_rate=0.05, final_learning_rate=0.01, average=0.9, gradient_clip=1.0)


class Regression(StageObjective):
    """A line through noisy points; whoever draws its batches elsewhere than from the step's stream fails below."""

    def __init__(self, module, stage=STAGE, seed=1, held_out=True, log_interval=5):
        super().__init__(module, stage, seed, log_interval)
        self.held_out, self.drawn = held_out, 0.0

    def loss(self, generator):
        x = torch.randn(self.stage.batch, 3, generator=generator)
        noise = torch.randn(self.stage.batch, generator=generator)
        self.drawn += float(noise[0])
        loss = (self.module(x)[:, 0] - x.sum(1) - 0.1 * noise).square().mean()
        self.record(loss=float(loss.detach()))
        return loss

    def held_out_loss(self, module):
        x = torch.eye(3)
        with torch.no_grad():
            return float((module(x)[:, 0] - x.sum(1)).square().mean()) if self.held_out else None

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def line() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 1)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_adam_with_the_averages_of_torch():
    """Against torch's optimiser, scheduler and AveragedModel, bit for bit."""
    ours = Regression(line(), held_out=False)
    trainer = Trainer(ours)
    for _ in trainer.steps():
        pass

    module = line()
    averaged = torch.optim.swa_utils.AveragedModel(
        module,
        multi_avg_fn=lambda kept, now, count: torch._foreach_lerp_(
            kept, now, 1.0 - min(0.9, (1.0 + int(count)) / (10.0 + int(count)))
        ),
    )
    optimiser = torch.optim.Adam(module.parameters(), 0.05, betas=(0.9, 0.99), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(0.05, 0.01, step, 40) / 0.05)
    theirs = Regression(module, held_out=False)
    for step in range(40):
        optimiser.zero_grad()
        theirs.loss(torch.Generator().manual_seed(1_000_003 + step)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        scheduler.step()
        averaged.update_parameters(module)
    assert same(ours.module, module)
    assert same(trainer.averaged, averaged.module)
    trainer.finish()
    assert same(ours.module, averaged.module)


@pytest.mark.parametrize("stop", [3, 10, 23, 39])
def test_an_interrupted_training_goes_on_to_the_same_numbers(tmp_path, stop):
    whole = Regression(line())
    curve = train(whole, tmp_path / "whole", 10)
    broken = Trainer(Regression(line()))
    for done in broken.steps(tmp_path / "parts" / "checkpoint.safetensors", 10):
        if done == stop:
            break
    again = Regression(line())
    assert train(again, tmp_path / "parts", 10) == curve
    assert again.drawn == whole.drawn
    assert same(again.module, whole.module)
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["checkpoint.safetensors"]


def test_a_finished_training_is_not_repeated(tmp_path):
    whole = Regression(line())
    curve = train(whole, tmp_path, 10)

    def never(generator):
        raise AssertionError("another step")

    again = Regression(line())
    again.loss = never
    assert train(again, tmp_path, 10) == curve
    assert same(again.module, whole.module)


def test_held_out_data_stop_the_training_and_keep_the_best(tmp_path):
    """A learning rate at which nothing good comes out: evaluations wait in vain, and the same after an interruption."""

    class Worse(Regression):
        def held_out_loss(self, module):
            return abs(self.step - 10.0)

    stage = STAGE.model_copy(update={"steps": 100})
    best = Worse(line(), stage)
    best.plan = Plan(100, 0.05, decay=warming_up(0.9), patience=3)
    trainer, states = Trainer(best), {}
    for done in trainer.steps(tmp_path / "checkpoint.safetensors", 7):
        states[done] = copy.deepcopy(trainer.averaged.state_dict())
    assert best.step == 26  # evaluated at 15, 20 and 25, after which the step that had begun was completed
    trainer.finish()
    assert [point["held_out"] for point in best.curve if "held_out" in point] == [5.0, 0.0, 5.0, 10.0, 15.0, 16.0]
    assert all(torch.equal(value, states[10][name]) for name, value in best.module.state_dict().items())
    again = Worse(line(), stage)
    again.plan = best.plan
    resumed = Trainer(again)
    assert list(resumed.steps(tmp_path / "checkpoint.safetensors", 7)) == []
    resumed.finish()
    assert same(again.module, best.module)
    assert again.curve == best.curve


def test_several_updates_in_a_step_and_gradients_that_are_there():
    module = line()

    class Two(Objective):
        def losses(self, generator):
            yield module.weight.sum()
            module.weight.grad = torch.full_like(module.weight, -2.0)
            module.bias.grad = None
            yield None

    before, updates = module.weight.detach().clone(), []
    objective = Two(module, Plan(1, 0.5, betas=(0.0, 0.0)))
    objective.after_update = lambda: updates.append(module.weight.detach().clone())
    assert list(Trainer(objective).steps()) == [1]
    assert len(updates) == 2
    assert torch.allclose(updates[0], before - 0.5)
    assert torch.allclose(updates[1], before)


def test_groups_have_their_own_rates_and_clips_and_restarts_forget():
    module = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)])
    rates, sizes = [], []

    def loss(step, generator):
        return 3.0 * module[0].sum() + 1e-3 * module[1].sum()

    plan = Plan(
        4, 1.0, schedule=lambda step: 0.5**step, gradient_clip=lambda step: 1.0 + step, restarts=frozenset({2}),
    )  # fmt: skip
    groups = [{"params": [module[0]], "lr": 0.1}, {"params": [module[1]], "lr": 0.2}]
    objective = Objective(module, plan, loss=loss, parameters=groups)
    trainer = Trainer(objective)
    for _ in trainer.steps():
        rates.append([group["lr"] for group in trainer.optimiser.param_groups])
        sizes.append([float(one.grad.abs()) for one in module])
        steps = {float(state["step"]) for state in trainer.optimiser.state.values()}
        assert steps == {[1.0, 2.0, 1.0, 2.0][objective.step - 1]}
    assert rates == [[0.1 * 0.5**n, 0.2 * 0.5**n] for n in range(4)]
    assert sizes == [[pytest.approx(min(3.0, 1.0 + n), rel=1e-5), 1e-3] for n in range(4)]
    assert [point["step"] for point in objective.curve] == [0.0, 1.0, 2.0, 3.0]


def test_a_gradient_that_is_not_finite_reaches_no_parameter():
    module = line()
    before = copy.deepcopy(module)

    def loss(step, generator):
        return (module.weight * torch.nan).sum()

    objective = Objective(module, Plan(5, 0.1), loss=loss, name="a test")
    with pytest.raises(ConvergenceError, match=r"gradient of step 0 of a test is not finite.*Lower the learning rates"):
        next(Trainer(objective).steps())
    assert same(module, before)


def test_checkpoints_of_other_trainings_are_refused(tmp_path):
    train(Regression(line()), tmp_path, 10)
    with pytest.raises(ConfigurationError, match=r"other settings \(seed 1 there, 2 now\).*remove it to start again"):
        train(Regression(line(), seed=2), tmp_path, 10)
    longer = STAGE.model_copy(update={"steps": 80})
    with pytest.raises(ConfigurationError, match=r"settings.steps 40 there, 80 now"):
        train(Regression(line(), longer), tmp_path, 10)
    with pytest.raises(ModelFileError, match="another module or optimiser"):
        train(Regression(nn.Linear(3, 2)), tmp_path, 10)
    other = Regression(line())
    other.plan = Plan(40, 0.1)  # without averages, which is no state of the other either
    with pytest.raises(ModelFileError, match="another module or optimiser"):
        Trainer(other).resume(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("name", ["step.ckpt", "training.ckpt"])
def test_folders_of_earlier_versions_are_refused(tmp_path, name):
    torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(ModelFileError, match=f"{name}: this checkpoint was written by an earlier version.*remove"):
        train(Regression(line()), tmp_path, 10)
    assert [file.name for file in tmp_path.iterdir()] == [name]


SCRIPT = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import Regression, line
from flowbridge.core.training.trainer import train

class Slow(Regression):
    def loss(self, generator):
        time.sleep(0.2)
        return super().loss(generator)

objective = Slow(line())
objective.name = "Regression"
train(objective, Path(sys.argv[1]), 3)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_ends_the_training_with_its_status_and_repetition_completes_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "stopped")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    whole, again = Regression(line()), Regression(line())
    steps = next(Trainer(Regression(line())).steps(tmp_path / "stopped" / "checkpoint.safetensors", 100))
    assert 3 < steps < STAGE.steps
    assert train(again, tmp_path / "stopped", 3) == train(whole, tmp_path / "whole", 3)
    assert same(again.module, whole.module)
