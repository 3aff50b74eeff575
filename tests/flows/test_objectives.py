"""The gradients that training follows, against finite differences of what they are the gradients of."""

import copy

import pytest
import torch

from flowbridge.core.energy import PotentialEnergy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.coordinate_flow import CoordinateFlow
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training import objectives
from flowbridge.flows.boltzmann.training.objectives import (
    effective_sample_fraction,
    force_matching_gradients,
    likelihood_gradients,
    path_gradients,
    reverse_kl,
)
from flowbridge.flows.boltzmann.training.target import TargetDensity, TargetValue

TINY = {
    "circular": "all",
    "torsions": {"couplings": 2, "components": 3, "hidden": [6]},
    "stiff": {"couplings": 2, "hidden": [6]},
}
POWERS = [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3)]


@pytest.fixture(scope="module")
def model(generator_of):
    return generator_of("CO", FlowConfiguration.model_validate(TINY))


class FlowTarget:
    """Another flow as the density to match: its gradient known exactly."""

    def __init__(self, flow: CoordinateFlow, broken: tuple[int, ...] = ()) -> None:
        self.flow, self.broken = flow, broken

    def __call__(self, coordinates: Coordinates) -> TargetValue:
        leaves = Coordinates(*(part.detach().requires_grad_(True) for part in coordinates))
        with torch.enable_grad():
            log_density = self.flow.log_prob(leaves)
            gradient = Coordinates(*torch.autograd.grad(log_density.sum(), leaves))
        log_density = log_density.detach().clone()
        for row in self.broken:
            log_density[row] = torch.nan
            for part in gradient:
                part[row] = torch.nan
        return TargetValue(log_density, gradient)


def beside(flow: CoordinateFlow, distance: float) -> CoordinateFlow:
    """Return a flow whose parameters differ by random numbers of that size."""
    moved = copy.deepcopy(flow)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return moved


@pytest.fixture(scope="module")
def other(model) -> CoordinateFlow:
    """A flow near that of ``model``, so that no weight or force is large enough to be limited."""
    return beside(model.flow, 0.02)


@pytest.fixture
def unlimited(monkeypatch):
    """Outliers count in full: a limited sample has, on purpose, not the gradient of any divergence."""
    monkeypatch.setattr(objectives, "_PATH_OUTLIER", 1e9)
    monkeypatch.setattr(objectives, "_FORCE_OUTLIER", 1e9)
    monkeypatch.setattr(objectives, "_LARGEST_WEIGHT", 1e9)


def gradients(loss: torch.Tensor, flow: CoordinateFlow) -> torch.Tensor:
    parameters = list(flow.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]).detach()


def flat(slopes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([slope.flatten() for slope in slopes])


def along_paths(
    flow: CoordinateFlow, latent: Coordinates, target, log_normaliser: float | None, powers: tuple[float, float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the path gradient, flat, and log-weights."""
    with torch.no_grad():
        samples, _ = flow(latent)
    log_density, gradient = target(samples)
    normaliser = torch.tensor(torch.nan if log_normaliser is None else log_normaliser, dtype=torch.float64)
    shares = torch.tensor(powers, dtype=torch.float64)
    (log_weights,), slopes = path_gradients(flow, *samples, log_density, *gradient, normaliser, shares)
    return flat(slopes), log_weights


def matched(
    flow: CoordinateFlow, data: Coordinates, gradient: Coordinates, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return likelihood and force losses, and the flat gradient of the weighted sum."""
    (likelihood, force), slopes = force_matching_gradients(flow, *data, *gradient, torch.tensor(weight))
    return likelihood, force, flat(slopes)


def differences(function, flow: CoordinateFlow, every: int, h: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions in the flat parameters, and central differences of a scalar there."""
    positions, slopes, offset = [], [], 0
    with torch.no_grad():
        for parameter in flow.parameters():
            flat = parameter.view(-1)
            for index in range(offset % every, len(flat), every):
                before = float(flat[index])
                values = []
                for shift in (h, -h):
                    flat[index] = before + shift
                    values.append(float(function()))
                flat[index] = before
                positions.append(offset + index)
                slopes.append((values[0] - values[1]) / (2 * h))
            offset += len(flat)
    return torch.tensor(positions), torch.tensor(slopes, dtype=torch.float64)


def latent_of(flow: CoordinateFlow, count: int, seed: int = 0) -> Coordinates:
    return flow.sample_latent(count, torch.Generator().manual_seed(seed))


def test_path_gradient_is_that_of_reverse_kl_along_the_path(model, other, unlimited):
    """The estimate with common random numbers, log q held at the parameters: only the samples move."""
    flow, target = model.flow, FlowTarget(other)
    latent = latent_of(flow, 6)
    frozen = CoordinateFlow(model.coordinates, model.flow_configuration).double()
    frozen.load_state_dict(flow.state_dict())

    def estimate() -> torch.Tensor:
        x, _ = flow(latent)
        return (frozen.log_prob(x) - other.log_prob(x)).mean()

    found, _ = along_paths(flow, latent, target, None, (1.0, 0.0, 0.0))
    positions, slopes = differences(estimate, flow, 13)
    assert len(positions) > 60
    assert torch.count_nonzero(slopes.abs() > 1e-6) > 30
    assert torch.allclose(found[positions], slopes, atol=1e-7, rtol=1e-5)


def test_reverse_kl_gradient_is_that_of_its_estimate(model, other):
    flow, target = model.flow, FlowTarget(other)
    latent = latent_of(flow, 6)

    def estimate() -> torch.Tensor:
        x, log_det = flow(latent)
        return (flow.base_log_prob(latent) - log_det - other.log_prob(x)).mean()

    found = gradients(reverse_kl(flow, latent, target), flow)
    positions, slopes = differences(estimate, flow, 13)
    assert torch.allclose(found[positions], slopes, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("powers", POWERS[1:])
def test_weighted_path_gradients_are_those_of_the_other_divergences(model, other, unlimited, powers):
    """Each sample's path gradient counts with c(w); the weights themselves are held."""
    flow, target = model.flow, FlowTarget(other)
    latent = latent_of(flow, 6)
    found, log_weights = along_paths(flow, latent, target, 0.3, powers)
    weights = torch.exp(log_weights - 0.3)
    factor = powers[0] + powers[1] * weights + powers[2] * weights.square()
    frozen = CoordinateFlow(model.coordinates, model.flow_configuration).double()
    frozen.load_state_dict(flow.state_dict())

    def estimate() -> torch.Tensor:
        x, _ = flow(latent)
        return (factor * (frozen.log_prob(x) - other.log_prob(x))).mean()

    positions, slopes = differences(estimate, flow, 23)
    assert torch.allclose(found[positions], slopes, atol=1e-7, rtol=1e-5)


def test_path_gradient_agrees_with_reverse_kl_on_average_but_is_quieter(model, unlimited):
    """The score term that it leaves out has mean zero; near the optimum it is all the noise there is."""
    flow, target = model.flow, FlowTarget(beside(model.flow, 3e-4))
    path, plain = [], []
    for seed in range(40):
        latent = latent_of(flow, 32, seed)
        path.append(along_paths(flow, latent, target, None, (1.0, 0.0, 0.0))[0])
        plain.append(gradients(reverse_kl(flow, latent, target), flow))
    path, plain = torch.stack(path), torch.stack(plain)
    used = plain.abs().amax(0) > 0
    difference = (plain - path)[:, used]
    z = difference.mean(0) / (difference.std(0) / 40**0.5)
    assert 0.8 < float(z.square().mean().sqrt()) < 1.25
    assert float(path.var(0).sum()) < 0.7 * float(plain.var(0).sum())


@pytest.mark.parametrize("powers", POWERS)
def test_nothing_is_left_to_learn_at_the_optimum_sample_by_sample(model, powers):
    flow, target = model.flow, FlowTarget(model.flow)
    for seed in range(4):
        latent = latent_of(flow, 3, seed)
        found, log_weights = along_paths(flow, latent, target, None, powers)
        assert float(found.abs().max()) < 1e-10
        assert float(effective_sample_fraction(log_weights)) == pytest.approx(1.0)
    assert float(gradients(reverse_kl(flow, latent_of(flow, 3), target), flow).abs().max()) > 1e-3


def test_nothing_is_left_to_learn_through_positions_and_forces(model):
    """The same with the whole path through Cartesian coordinates: the generator's energy as the target's."""
    target = TargetDensity(model.coordinates, PotentialEnergy(model), 300.0)
    found, log_weights = along_paths(model.flow, latent_of(model.flow, 8), target, None, (1.0, 0.0, 0.0))
    assert float(found.abs().max()) < 1e-8
    assert float(log_weights.std()) < 1e-8


def test_force_matching_vanishes_for_the_flow_itself(model):
    with torch.no_grad():
        data, _ = model.flow(latent_of(model.flow, 12))
    target = FlowTarget(model.flow)(data)
    likelihood, force, both = matched(model.flow, data, target.gradient, 1.0)
    (alone,), slopes = likelihood_gradients(model.flow, *data)
    assert torch.allclose(likelihood, alone)
    assert float(force) < 1e-16
    assert torch.allclose(both, flat(slopes), atol=1e-8)


def test_force_matching_gradient_is_that_of_its_value(model, other, unlimited):
    with torch.no_grad():
        data, _ = other(latent_of(other, 6))
    wanted = FlowTarget(other)(data).gradient
    flow = model.flow

    def value() -> torch.Tensor:
        likelihood, force, _ = matched(flow, data, wanted, 3.0)
        return likelihood + 3.0 * force

    _, force, found = matched(flow, data, wanted, 3.0)
    positions, slopes = differences(value, flow, 29)
    assert float(force) > 1e-4
    assert torch.allclose(found[positions], slopes, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("objective", ["path", "reverse_kl"])
def test_a_sample_without_energy_counts_for_nothing(model, other, objective):
    flow = model.flow
    latent = latent_of(flow, 8)
    rest = Coordinates(*(part[[0, 1, 3, 4, 6, 7]] for part in latent))

    def slopes(latent: Coordinates, target: FlowTarget) -> torch.Tensor:
        if objective == "reverse_kl":
            return gradients(reverse_kl(flow, latent, target), flow)
        return along_paths(flow, latent, target, 0.0, (0.5, 0.5, 0.0))[0]

    found = slopes(latent, FlowTarget(other, broken=(2, 5)))
    expected = slopes(rest, FlowTarget(other)) * (6 / 8 if objective == "path" else 1.0)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, expected, atol=1e-12)


def test_outliers_are_limited_to_five_medians(model, other):
    """One sample in a hundred must not carry the step."""

    class Pushed(FlowTarget):
        def __call__(self, coordinates: Coordinates) -> TargetValue:
            value = super().__call__(coordinates)
            value.gradient.stiff[4] += 1e6
            return value

    flow, latent = model.flow, latent_of(model.flow, 9)
    plain, _ = along_paths(flow, latent, FlowTarget(other), None, (1.0, 0.0, 0.0))
    pushed, _ = along_paths(flow, latent, Pushed(other), None, (1.0, 0.0, 0.0))
    assert float(pushed.norm()) < 10 * float(plain.norm())
