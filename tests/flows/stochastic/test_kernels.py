"""Kernels: the ratio of the probabilities of both ways, what stays invariant, what keeps volume."""

import math

import pytest
import torch
from torch.func import jacrev

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.stochastic.distributions import InterpolatedEnergy, Schedule, StandardNormal
from flowbridge.flows.stochastic.hamiltonian import HamiltonianKernel, leapfrog
from flowbridge.flows.stochastic.kernels import energy_change
from flowbridge.flows.stochastic.langevin import LangevinKernel, OverdampedLangevinKernel
from flowbridge.flows.stochastic.metropolis import MetropolisKernel

DIMENSION = 2
SCALE = torch.tensor([0.7, 1.4], dtype=torch.float64)


def quartic(x):
    """A double well along the first coordinate, coupled to the second."""
    return x[..., 0] ** 4 - 2.0 * x[..., 0] ** 2 + 0.3 * x[..., 0] + 0.5 * (x[..., 1] - 0.4 * x[..., 0]) ** 2


def energy(fraction: float = 0.6) -> InterpolatedEnergy:
    return InterpolatedEnergy(StandardNormal(DIMENSION, torch.float64), quartic, fraction)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels() -> dict[str, object]:
    return {
        "metropolis": MetropolisKernel(0.5, 4, scale=SCALE),
        "overdamped": OverdampedLangevinKernel(0.05, 3, scale=SCALE),
        "langevin": LangevinKernel(0.2, 3, friction=1.5, scale=SCALE),
        "hmc": HamiltonianKernel(0.25, 3, 2, scale=SCALE),
        "hmc without acceptance": HamiltonianKernel(0.25, 3, 2, accept=False, scale=SCALE),
    }


def test_overdamped_ratio_is_the_ratio_of_the_densities():
    kernel, u, start = OverdampedLangevinKernel(0.05, 1, scale=SCALE), energy(), draws(50, 2)
    moved = kernel(start, u, torch.Generator().manual_seed(1))
    step = 0.05 * SCALE

    def log_density(old, new):
        point = old.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(u(point).sum(), point)
        return torch.distributions.Normal(old - step * slope, (2.0 * step).sqrt()).log_prob(new).sum(-1)

    expected = log_density(moved.value, start) - log_density(start, moved.value)
    torch.testing.assert_close(moved.log_ratio, expected, rtol=1e-10, atol=1e-10)


def test_langevin_ratio_is_the_ratio_of_the_joint_densities():
    """The density of a step of the pair (position, velocity), by the Jacobian of the map from noises, both ways."""
    step, friction, u = 0.2, 1.5, energy()
    kernel, start = LangevinKernel(step, 1, friction), draws(20, 2)
    moved = kernel(start, u, torch.Generator().manual_seed(1))
    replay = torch.Generator().manual_seed(1)
    velocity, first, second = (torch.randn(20, 2, generator=replay, dtype=torch.float64) for _ in range(3))

    def slope(x):
        return torch.func.grad(lambda y: u(y[None])[0])(x)

    def step_of(noises, x, v):
        half = v + 0.5 * step * (-slope(x) - friction * v + math.sqrt(4.0 * friction / step) * noises[:2])
        new = x + step * half
        end = half + 0.5 * step * (-slope(new) + math.sqrt(4.0 * friction / step) * noises[2:])
        return torch.cat([new, end / (1.0 + 0.5 * friction * step)])

    def log_density(x, v, goal):
        """Density of arriving at ``goal``, with the noises found by Newton's method."""
        noises = torch.zeros(4, dtype=torch.float64)
        for _ in range(30):
            noises = noises - torch.linalg.solve(jacrev(step_of)(noises, x, v), step_of(noises, x, v) - goal)
        assert (step_of(noises, x, v) - goal).abs().max() < 1e-11
        return normal(noises) - torch.linalg.slogdet(jacrev(step_of)(noises, x, v))[1]

    def normal(x):
        return -0.5 * x.square().sum() - 0.5 * len(x) * math.log(2.0 * math.pi)

    for index in range(20):
        x, v = start[index], velocity[index]
        end = step_of(torch.cat([first[index], second[index]]), x, v)
        torch.testing.assert_close(end[:2], moved.value[index])
        there = normal(v) + log_density(x, v, end)
        back = normal(end[2:]) + log_density(end[:2], -end[2:], torch.cat([x, -v]))
        torch.testing.assert_close(moved.log_ratio[index], back - there, rtol=1e-8, atol=1e-8)


def test_friction_to_zero_is_leapfrog():
    start, u = draws(30, 2), energy()
    langevin = LangevinKernel(0.1, 1, friction=1e-12)(start, u, torch.Generator().manual_seed(3))
    leap = HamiltonianKernel(0.1, 1, accept=False)(start, u, torch.Generator().manual_seed(3))
    torch.testing.assert_close(langevin.value, leap.value, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(langevin.log_ratio, leap.log_ratio, rtol=0.0, atol=1e-5)


def test_leapfrog_keeps_volume_and_is_reversible():
    step = 0.3 * SCALE
    u = energy()

    def flow(state):
        x, p = state[None, :2], state[None, 2:]
        for number in range(5):
            p = p - (0.5 if number == 0 else 1.0) * step * torch.func.grad(lambda y: u(y).sum())(x)
            x = x + step * p
        p = p - 0.5 * step * torch.func.grad(lambda y: u(y).sum())(x)
        return torch.cat([x[0], p[0]])

    for seed in range(5):
        state = draws(4, seed=seed)
        x, p = leapfrog(state[None, :2], state[None, 2:], u, step, 5)
        torch.testing.assert_close(torch.cat([x[0], p[0]]), flow(state))  # so the Jacobian below is leapfrog's
        assert abs(float(torch.linalg.det(jacrev(flow)(state))) - 1.0) < 1e-11
        back, minus = leapfrog(x, -p, u, step, 5)
        torch.testing.assert_close(torch.cat([back[0], -minus[0]]), state, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("name", ["metropolis", "hmc"])
def test_detailed_balance_of_kernels_with_acceptance(name):
    """From equilibrium, moves between any two cells are as frequent as those back, within the errors of counting."""
    u, count = energy(1.0), 400_000
    generator = torch.Generator().manual_seed(11)
    # exact draws of the first coordinate by its distribution function, of the second given the first
    grid = torch.linspace(-3.0, 3.0, 20_001, dtype=torch.float64)
    weight = torch.exp(-quartic(torch.stack([grid, 0.4 * grid], 1)))
    cumulative = torch.cumulative_trapezoid(weight, grid)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    first = grid[torch.searchsorted(cumulative, uniform) + 1]
    second = 0.4 * first + torch.randn(count, generator=generator, dtype=torch.float64)
    start = torch.stack([first, second], 1)
    moved = kernels()[name](start, u, generator)
    assert 0.2 < float(moved.acceptance.mean()) < 0.999
    torch.testing.assert_close(moved.log_ratio, u(moved.value) - u(start))
    edges = torch.tensor([-1.0, -0.4, 0.2, 0.8], dtype=torch.float64)
    cells = [torch.bucketize(point[:, 0], edges) * 2 + (point[:, 1] > 0.0) for point in (start, moved.value)]
    flux = torch.bincount(cells[0] * 10 + cells[1], minlength=100).reshape(10, 10).double()
    excess = (flux - flux.T) / (flux + flux.T).sqrt().clamp_min(1.0)
    upper = excess[torch.triu_indices(10, 10, 1).unbind()]
    assert float(flux.sum() - flux.diagonal().sum()) > 0.2 * count  # most of the test is not about staying
    assert float(upper.abs().max()) < 4.0
    assert float(upper.square().mean()) < 1.6


@pytest.mark.parametrize("name", list(kernels()))
def test_mean_of_the_ratio_of_reversal_is_one(name):
    """``E exp(u(x) - u(x') + dS) = 1`` from equilibrium, for long and inexact steps too."""
    u, count = energy(0.0), 200_000
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    moved = kernels()[name](start, u, generator)
    log_weights = u(start) - u(moved.value) + moved.log_ratio
    if "without" in name or "langevin" in name or "overdamped" in name:
        assert float(log_weights.std()) > 1e-3  # there is something to correct
    weights = log_weights.exp()
    assert abs(float(weights.mean()) - 1.0) < 4.0 * float(weights.std()) / math.sqrt(count) + 1e-12
    second = (weights * moved.value[:, 0] ** 2).mean()
    error = (weights * moved.value[:, 0] ** 2).std() / math.sqrt(count)
    assert abs(float(second) - 1.0) < 4.0 * float(error)


@pytest.mark.parametrize("name", list(kernels()))
def test_random_numbers_come_from_the_generator_alone(name):
    start, kernel = draws(10, 2), kernels()[name]
    torch.manual_seed(1)
    one = kernel(start, energy(), torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    two = kernel(start, energy(), torch.Generator().manual_seed(5))
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.log_ratio, two.log_ratio)
    with torch.no_grad():
        three = kernel(start, energy(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(one.value, three.value)
    torch.testing.assert_close(one.log_ratio, three.log_ratio)


def test_a_wall_is_never_crossed_and_what_starts_behind_it_has_no_weight():
    def walled(x):
        return torch.where(x[:, 0] > 0.0, 0.5 * x.square().sum(-1), torch.inf)

    u = InterpolatedEnergy(StandardNormal(2, torch.float64), walled, 1.0)
    start = draws(1000, 2)
    moved = MetropolisKernel(0.5, 5)(start, u, torch.Generator().manual_seed(1))
    inside = start[:, 0] > 0.0
    assert bool((moved.value[inside, 0] > 0.0).all())
    assert bool(torch.isfinite(moved.log_ratio[inside]).all())
    assert bool((moved.log_ratio[~inside] == -torch.inf).all())


def test_energy_change_has_finite_gradients_beside_infinite_energies():
    before = torch.tensor([1.0, torch.inf, torch.inf], dtype=torch.float64, requires_grad=True)
    after = torch.tensor([2.0, 1.0, torch.inf], dtype=torch.float64, requires_grad=True)
    change = energy_change(before, after)
    assert change.tolist() == [1.0, -math.inf, -math.inf]
    change[0].backward()
    assert before.grad.tolist() == [-1.0, 0.0, 0.0]
    assert after.grad.tolist() == [1.0, 0.0, 0.0]


def test_rejected_trajectories_do_not_reach_the_gradient():
    """A leapfrog step into a region where the energy is NaN is rejected, and the gradient of the rest is finite."""

    def forbidden(x):
        return torch.where(x[:, 0] < 1.0, 0.5 * x.square().sum(-1), (1.0 - x[:, 0]).sqrt() - 1.0)

    u = InterpolatedEnergy(StandardNormal(2, torch.float64), forbidden, 1.0)
    start = draws(200, 2).clamp(max=0.99).requires_grad_(True)
    kernel = HamiltonianKernel(0.5, 3, learned=True)
    moved = kernel(start, u, torch.Generator().manual_seed(2))
    assert 0.0 < float(moved.acceptance.mean()) < 1.0
    moved.value.square().sum().backward()
    assert bool(torch.isfinite(start.grad).all())
    assert bool(torch.isfinite(kernel.log_step.grad))


def test_schedules_keep_their_order_and_their_ends():
    schedule = Schedule([0.0, 0.25, 0.25, 0.5, 1.0], learned=True)
    assert [float(value) for value in schedule()] == pytest.approx([0.0, 0.25, 0.25, 0.5, 1.0])
    with torch.no_grad():
        schedule.logits.add_(draws(len(schedule.logits), seed=1))
    moved = [float(value) for value in schedule()]
    assert moved == sorted(moved)
    assert moved[0] == 0.0
    assert moved[-1] == 1.0
    assert moved[1] == pytest.approx(moved[2])
    assert moved[1] != pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MetropolisKernel(0.0, 5), "positive"),
        (lambda: MetropolisKernel(0.1, 0), "at least one step"),
        (lambda: OverdampedLangevinKernel(float("inf"), 1), "positive"),
        (lambda: LangevinKernel(0.1, 1, friction=0.0), "HamiltonianKernel"),
        (lambda: HamiltonianKernel(0.1, 3, 0), "trajectory"),
        (lambda: MetropolisKernel(0.1, 1, scale=torch.tensor([1.0, -1.0])), "scale"),
        (lambda: Schedule([0.5, 0.2]), "not decrease"),
        (lambda: Schedule([1.5]), "[0, 1]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert said in str(caught.value)
