"""Merging during training: any optimiser, any point of the cycle."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.training.checkpoints import read_checkpoint, write_checkpoint
from flowbridge.flows.transforms.linear_layer import InvertibleLinear
from flowbridge.flows.transforms.merging import MergingSchedule, restart_merged
from flowbridge.flows.transforms.rank_one_matrix import MergeLimits

SIZE = 4

OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1.0),
}


def target() -> torch.Tensor:
    """A matrix of positive determinant, the sign that the identity has."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.eye(SIZE, dtype=torch.float64)
    matrix += 0.5 * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    assert torch.linalg.det(matrix) > 0.1
    return matrix


def trained(name="Adam", every=5, **settings):
    layer = InvertibleLinear(SIZE, seed=1, dtype=torch.float64)
    optimiser = OPTIMISERS[name](layer.parameters())
    return layer, optimiser, MergingSchedule(layer, optimiser, every, **settings)


def step(layer, optimiser, number, goal=None):
    x = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    goal = target() if goal is None else goal
    optimiser.zero_grad()
    loss = (layer(x).value - x @ goal.T).square().sum(-1).mean()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_trains_through_merges(name):
    layer, optimiser, _ = trained(name)
    losses = [step(layer, optimiser, number) for number in range(300)]
    assert int(layer.weight.merges) == 60
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    torch.testing.assert_close(layer.weight.inverse, torch.linalg.inv(layer.weight.matrix))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_after_a_merge_v_is_new_to_the_optimiser_and_u_is_not(name):
    """One more step moves v as the first step of a fresh optimiser would, and keeps what is known of u."""
    layer, optimiser, _ = trained(name)
    for number in range(5):
        step(layer, optimiser, number)
    matrix = layer.weight
    assert int(matrix.merges) == 1
    fresh = OPTIMISERS[name]([torch.nn.Parameter(matrix.v.detach().clone())])
    lazily = fresh.state.get(fresh.param_groups[0]["params"][0], {})
    assert set(optimiser.state.get(matrix.v, {})) == set(lazily)
    for key, value in lazily.items():
        torch.testing.assert_close(optimiser.state[matrix.v][key], value)
    if name != "SGD":
        assert "step" not in optimiser.state[matrix.u] or float(optimiser.state[matrix.u]["step"]) == 5.0
        assert optimiser.state[matrix.u]


def test_lbfgs_forgets_everything():
    layer = InvertibleLinear(SIZE, seed=1, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(layer.parameters(), lr=0.5)
    MergingSchedule(layer, optimiser, every=2)
    x = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def closure():
        optimiser.zero_grad()
        loss = (layer(x).value - x @ target().T).square().sum(-1).mean()
        loss.backward()
        return loss

    losses = []
    for number in range(20):
        losses.append(float(optimiser.step(closure).detach()))
        assert bool(optimiser.state) == (number % 2 == 0)
    assert losses[-1] < 1e-2 * losses[0]


def test_a_merge_elsewhere_is_noticed_before_the_next_step():
    layer, optimiser, _ = trained(every=100)
    for number in range(3):
        step(layer, optimiser, number)
    layer.eval()
    assert int(layer.weight.merges) == 1
    layer.train()
    step(layer, optimiser, 3)
    assert float(optimiser.state[layer.weight.v]["step"]) == 1.0
    assert float(optimiser.state[layer.weight.u]["step"]) == 4.0


@pytest.mark.parametrize("name", ["momentum", "Adam", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("stop", [13, 15])
def test_a_checkpoint_in_the_middle_of_a_cycle_goes_on_to_the_same_numbers(name, stop, tmp_path):
    layer, optimiser, schedule = trained(name, every=5, correct_every=2)
    for number in range(stop):
        step(layer, optimiser, number)
    parts = {"layer": layer, "optimiser": optimiser, "schedule": schedule}
    write_checkpoint(tmp_path / "checkpoint", {name: part.state_dict() for name, part in parts.items()})
    expected = [step(layer, optimiser, number) for number in range(stop, 40)]

    layer_2, optimiser_2, schedule_2 = trained(name, every=5, correct_every=2)
    stored = read_checkpoint(tmp_path / "checkpoint")
    for name, part in {"layer": layer_2, "optimiser": optimiser_2, "schedule": schedule_2}.items():
        part.load_state_dict(stored[name])
    assert [step(layer_2, optimiser_2, number) for number in range(stop, 40)] == expected
    assert all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), layer_2.state_dict().values(), strict=True)
    )


def test_merges_that_are_put_off_too_often_are_done_directly():
    layer, optimiser, schedule = trained("SGD", every=1, limits=MergeLimits(log_factor=(10.0, 15.0), patience=3))
    for number in range(8):
        step(layer, optimiser, number)
    assert int(layer.weight.merges) == 2
    assert schedule.postponed == [0]
    torch.testing.assert_close(layer.weight.inverse, torch.linalg.inv(layer.weight.matrix))


@pytest.mark.parametrize("goal", [1.0, -1.0])
def test_the_determinant_keeps_its_sign_so_only_a_target_of_that_sign_is_reached(goal):
    mirrored = torch.diag(torch.tensor([goal, 1.0, 1.0, 1.0], dtype=torch.float64))
    losses = {}
    for start in (1, -1):
        matrix = torch.eye(SIZE, dtype=torch.float64)[[1, 2, 0, 3] if start == 1 else [1, 0, 2, 3]]
        layer = InvertibleLinear(SIZE, seed=1, matrix=matrix, dtype=torch.float64)
        optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
        schedule = MergingSchedule(layer, optimiser, every=10, limits=MergeLimits(log_det=(-5.0, 15.0)))
        for number in range(600):
            losses[start] = step(layer, optimiser, number, goal=mirrored)
            assert layer.weight.sign() == start
        assert (schedule.held_back > 0) == (start != goal)
        torch.testing.assert_close(layer.weight.inverse, torch.linalg.inv(layer.weight.matrix))
    assert losses[int(goal)] < 0.2
    assert losses[-int(goal)] > 0.5


def test_averages_do_not_count_merged_perturbations_twice():
    """Just after a merge the averaged matrix is the trained one; in between it lags behind by less than the trained u."""
    layer, optimiser, _ = trained(every=5)
    averaged = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for number in range(1, 21):
        step(layer, optimiser, number)
        averaged.update_parameters(layer)
        restart_merged(averaged.module, layer)
        difference = (averaged.module.weight.dense() - layer.weight.dense()).detach()
        if number % 5 == 0:
            assert torch.equal(difference, torch.zeros_like(difference))
        elif number > 1:  # the first update copies
            assert 0.0 < float(difference.norm()) < float(torch.outer(layer.weight.u, layer.weight.v).detach().norm())


def test_schedules_are_refused_where_they_cannot_work():
    layer, optimiser, _ = trained()
    with pytest.raises(ConfigurationError, match="holds no RankOneMatrix"):
        MergingSchedule(torch.nn.Linear(2, 2), optimiser)
    with pytest.raises(ConfigurationError, match="every 1 or more"):
        MergingSchedule(layer, optimiser, every=0)
    step(layer, optimiser, 0)
    with pytest.raises(ConfigurationError, match="already made steps"):
        MergingSchedule(layer, optimiser)
    with pytest.raises(ConfigurationError, match="the state is of 2 matrices"):
        trained()[2].load_state_dict({"steps": 0, "held_back": 0, "postponed": [0, 0], "merges": [0, 0]})


def test_a_closed_schedule_leaves_the_optimiser_alone():
    layer, optimiser, schedule = trained(every=1)
    schedule.close()
    step(layer, optimiser, 0)
    assert int(layer.weight.merges) == 0
