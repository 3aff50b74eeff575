"""Paths and their weights, on targets whose partition function is known."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError, NonFiniteEnergyError
from flowbridge.flows.stochastic.annealed_importance_sampling import annealed_importance_sampling
from flowbridge.flows.stochastic.distributions import StandardNormal
from flowbridge.flows.stochastic.hamiltonian import HamiltonianKernel
from flowbridge.flows.stochastic.langevin import LangevinKernel, OverdampedLangevinKernel
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.resampling import (
    Resampling,
    log_mean_weight,
    systematic_indices,
)
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow, path_kullback_leibler, path_likelihood
from flowbridge.flows.transforms.bijection import Chain
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.sinh_arcsinh import Affine

MEAN, WIDTH = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.6, 0.9], dtype=torch.float64)
LOG_Z = float(WIDTH.log().sum()) + math.log(2.0 * math.pi)


def gaussian(x):
    """Unnormalised: log Z is LOG_Z."""
    return 0.5 * ((x - MEAN) / WIDTH).square().sum(-1)


def prior() -> StandardNormal:
    return StandardNormal(2, torch.float64)


def coupling(transformed: int, seed: int, stir: float = 0.1) -> Coupling:
    layer = Coupling(2, [transformed], Affine(), (8,), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(stir * torch.randn(parameter.shape, generator=generator))
    return layer.double()


KERNELS = {
    "metropolis": lambda learned=False: MetropolisKernel(0.4, 5, learned=learned),
    "overdamped": lambda learned=False: OverdampedLangevinKernel(0.03, 3, learned=learned),
    "langevin": lambda learned=False: LangevinKernel(0.15, 3, friction=1.0, learned=learned),
    "hmc": lambda learned=False: HamiltonianKernel(0.2, 3, learned=learned),
    "hmc without acceptance": lambda learned=False: HamiltonianKernel(0.2, 3, accept=False, learned=learned),
}


def mixed(name: str, *, learned: bool = False) -> StochasticFlow:
    steps = [coupling(0, 1), KERNELS[name](learned), coupling(1, 2), KERNELS[name](learned), coupling(0, 3)]
    return StochasticFlow(prior(), gaussian, steps, [0.5, 0.9], learned_schedule=learned)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ladder_of_metropolis_kernels_is_annealed_importance_sampling():
    """The same weights, path by path, as an implementation of Neal's algorithm in numpy that shares only random numbers."""
    rungs, steps, count, width = 8, 3, 200, 0.5
    ladder = annealed_importance_sampling(prior(), gaussian, lambda rung: MetropolisKernel(width, steps), rungs)
    paths = ladder.sample(count, seeded(4))

    numbers = seeded(4)

    def normal(*shape):
        return torch.randn(*shape, generator=numbers, dtype=torch.float64).numpy()

    def u_prior(x):
        return 0.5 * (x**2).sum(1) + math.log(2.0 * math.pi)

    def u_target(x):
        return 0.5 * (((x - MEAN.numpy()) / WIDTH.numpy()) ** 2).sum(1)

    x = normal(count, 2)
    log_weights = np.zeros(count)
    for rung in range(1, rungs + 1):
        low, high = (rung - 1) / rungs, rung / rungs
        # w is multiplied by f_rung(x) / f_(rung - 1)(x) at the point that the lower rung has reached
        log_weights += (high - low) * (u_prior(x) - u_target(x))
        for _ in range(steps):
            y = x + width * normal(count, 2)
            change = (1.0 - high) * (u_prior(y) - u_prior(x)) + high * (u_target(y) - u_target(x))
            uniform = torch.rand(count, generator=numbers, dtype=torch.float64).numpy()
            x = np.where((np.log(uniform) < -change)[:, None], y, x)
    np.testing.assert_allclose(paths.value.numpy(), x, rtol=0.0, atol=1e-12)
    np.testing.assert_allclose(paths.log_weights.numpy(), log_weights, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_mean_weight_is_the_partition_function_within_honest_error_bars(name):
    """Sixty-odd of a hundred error bars of one deviation hold log Z, and so do nearly all of two."""
    flow, repeats, count = mixed(name), 120, 1000
    scores = []
    for repeat in range(repeats):
        weights = (flow.sample(count, seeded(repeat)).log_weights - LOG_Z).exp()
        scores.append(float((weights.mean() - 1.0) / (weights.std() / math.sqrt(count))))
    scores = np.abs(scores)
    assert 0.55 < (scores < 1.0).mean() < 0.80
    assert (scores < 2.0).mean() > 0.87


@pytest.mark.parametrize("name", KERNELS)
def test_weighted_averages_are_those_of_the_target(name):
    flow, count = mixed(name), 40_000
    paths = flow.sample(count, seeded(3))
    weights = torch.softmax(paths.log_weights, 0)
    for observable, expected in ((paths.value, MEAN), ((paths.value - MEAN).square(), WIDTH.square())):
        mean = (weights.unsqueeze(1) * observable).sum(0)
        error = (weights.unsqueeze(1) * (observable - mean)).square().sum(0).sqrt()
        assert bool(((mean - expected).abs() < 4.0 * error).all())


@pytest.mark.parametrize("name", KERNELS)
def test_paths_backward_from_the_target_give_the_inverse_of_the_partition_function(name):
    """``E 1/w = 1/Z`` over backward paths from equilibrium (the second equality of Crooks)."""
    flow, count = mixed(name), 100_000
    data = MEAN + WIDTH * torch.randn(count, 2, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        inverse = (LOG_Z - flow.reverse(data, seeded(2)).log_weights).exp()
    assert abs(float(inverse.mean()) - 1.0) < 5.0 * float(inverse.std()) / math.sqrt(count)


def test_without_kernels_it_is_a_normalizing_flow():
    layers = [coupling(0, 1), coupling(1, 2)]
    flow, chain = StochasticFlow(prior(), gaussian, layers), Chain(layers)
    data = torch.randn(50, 2, generator=seeded(1), dtype=torch.float64)
    latent, log_det = chain.inverse(data)
    log_prob = prior().log_prob(latent) + log_det
    torch.testing.assert_close(path_likelihood(flow, data, seeded(0)), -log_prob.mean())
    torch.testing.assert_close(flow.reverse(data, seeded(0)).log_weights, -gaussian(data) - log_prob)


def test_path_losses_bound_what_they_are_named_after():
    """``J_KL >= -log Z`` and ``J_ML >=`` the entropy of the data, and the gap is the divergence of paths."""
    flow = mixed("metropolis")
    data = MEAN + WIDTH * torch.randn(20_000, 2, generator=seeded(1), dtype=torch.float64)
    entropy = LOG_Z + 1.0
    with torch.no_grad():
        assert float(path_kullback_leibler(flow, 20_000, seeded(2))) > -LOG_Z
        assert float(path_likelihood(flow, data, seeded(3))) > entropy


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_of_both_losses_agree_with_finite_differences(name):
    """Of every kind of parameter: couplings, step sizes, schedule; random numbers held fixed."""
    flow = mixed(name, learned=True)
    data = MEAN + WIDTH * torch.randn(16, 2, generator=seeded(1), dtype=torch.float64)
    losses = (
        lambda: path_kullback_leibler(flow, 16, seeded(5)),
        lambda: path_likelihood(flow, data, seeded(6)),
    )
    chosen = [flow.schedule.logits, flow.steps[1].log_step, *flow.steps[0].parameters(), *flow.steps[4].parameters()]
    for loss in losses:
        gradients = torch.autograd.grad(loss(), chosen)
        for parameter, gradient in zip(chosen, gradients, strict=True):
            flat = parameter.data.view(-1)
            for index in {0, flat.numel() - 1}:
                kept, h = float(flat[index]), 1e-6
                values = []
                for sign in (1.0, -1.0):
                    flat[index] = kept + sign * h
                    with torch.no_grad():
                        values.append(float(loss()))
                flat[index] = kept
                difference = (values[0] - values[1]) / (2.0 * h)
                assert float(gradient.reshape(-1)[index]) == pytest.approx(difference, rel=2e-5, abs=2e-7)


def test_resampled_paths_keep_the_partition_function_and_the_averages():
    far = torch.tensor([2.5, -2.5], dtype=torch.float64)

    def target(x):
        return 0.5 * ((x - far) / 0.3).square().sum(-1)

    log_z = 2.0 * math.log(0.3) + math.log(2.0 * math.pi)
    ladder = annealed_importance_sampling(prior(), target, lambda rung: MetropolisKernel(0.4, 3), 10)
    estimates, times, means = [], 0, []
    for repeat in range(150):
        paths = ladder.sample(400, seeded(repeat), Resampling(0.6))
        times += paths.resampled
        estimates.append(float(log_mean_weight(paths.log_weights)) - log_z)
        means.append((torch.softmax(paths.log_weights, 0).unsqueeze(1) * paths.value).sum(0))
    assert times > 300
    ratio = np.exp(estimates)
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / math.sqrt(len(ratio))
    spread = torch.stack(means)
    assert bool(((spread.mean(0) - far).abs() < 4.0 * spread.std(0) / math.sqrt(150) + 2e-3).all())
    plain = np.exp([float(log_mean_weight(ladder.sample(400, seeded(r)).log_weights)) - log_z for r in range(150)])
    assert ratio.std() < 0.7 * plain.std()  # what it is for


def test_systematic_resampling_rounds_up_or_down_and_is_unbiased():
    log_weights = torch.tensor([0.1, 0.25, 0.05, 0.6], dtype=torch.float64).log()
    counts = torch.stack(
        [torch.bincount(systematic_indices(log_weights, seeded(seed)), minlength=4) for seed in range(4000)]
    )
    expected = 4.0 * log_weights.exp()
    assert bool(((counts - expected).abs() < 1.0).all())
    torch.testing.assert_close(counts.double().mean(0), expected, rtol=0.0, atol=0.03)


def test_energies_that_are_no_numbers_are_errors():
    flow = StochasticFlow(prior(), lambda x: torch.full((len(x),), torch.nan, dtype=torch.float64), [])
    with pytest.raises(NonFiniteEnergyError, match="not a number"):
        flow.sample(10, seeded(0))
    with pytest.raises(NonFiniteEnergyError, match="Kullback-Leibler"):
        path_kullback_leibler(flow, 10, seeded(0))
    nowhere = StochasticFlow(prior(), lambda x: torch.full((len(x),), torch.inf, dtype=torch.float64), [])
    with pytest.raises(NonFiniteEnergyError, match="weight zero"):
        nowhere.sample(10, seeded(0))


def test_what_cannot_be_put_together_is_refused():
    with pytest.raises(ConfigurationError, match="step 0 is a Linear"):
        StochasticFlow(prior(), gaussian, [torch.nn.Linear(2, 2)])
    with pytest.raises(ConfigurationError, match="2 fractions were given for 1 kernels"):
        StochasticFlow(prior(), gaussian, [MetropolisKernel(0.1, 1)], [0.5, 1.0])
    with pytest.raises(ConfigurationError, match="rung"):
        annealed_importance_sampling(prior(), gaussian, lambda rung: MetropolisKernel(0.1, 1), 0)
    with pytest.raises(ConfigurationError, match="threshold"):
        Resampling(0.0)
