"""Samples through compiled code are those of the generator."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.boltzmann import position_sampler
from flowbridge.flows.boltzmann.compiled_functions import ITERATIONS
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.position_sampler import PositionSampler

TINY = {
    "circular": "soft",
    "torsions": {"couplings": 1, "components": 3, "hidden": [4], "learn_steepness": True},
    "stiff": {"couplings": 1, "hidden": [4]},
}


@pytest.fixture(scope="module")
def model(generator_of):
    made = generator_of("CO", FlowConfiguration.model_validate(TINY))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made


def drawn(model, batches: int, size: int):
    """Draw as the sampler does, with torch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        parts = [model.positions_of(model.flow.sample_latent(size, generator)) for _ in range(batches)]
    return torch.cat([part.positions for part in parts]), torch.cat([part.log_prob for part in parts])


def test_compiled_samples_and_their_densities(model):
    sampler = PositionSampler(model, 8, "always")
    found = sampler(20, torch.Generator().manual_seed(1))
    positions, log_prob = drawn(model, 3, 8)
    assert torch.allclose(found.positions, positions[:20], atol=1e-10)
    assert torch.allclose(found.log_prob, log_prob[:20], atol=1e-8)
    assert torch.allclose(found.log_prob, model.log_prob(found.positions), atol=1e-8)
    assert sampler._drawn._programs
    assert all(sampler._drawn._programs.values())


def test_unfinished_ones_are_finished(model, monkeypatch):
    monkeypatch.setitem(ITERATIONS, torch.float64, 5)
    sampler = PositionSampler(model, 30, "always")
    unfinished = []

    class Bounded:
        compiles = True

        def __call__(self, *latent):
            result = position_sampler.samples(model, *latent)
            unfinished.append(int((~result[2]).sum()))
            return result

    sampler._drawn = Bounded()
    found = sampler(30, torch.Generator().manual_seed(1))
    positions, log_prob = drawn(model, 1, 30)
    assert 0 < unfinished[0] < 30
    assert torch.allclose(found.positions, positions, atol=1e-12)
    assert torch.allclose(found.log_prob, log_prob, atol=1e-9)


def test_bad_numbers(model):
    with pytest.raises(ConfigurationError, match="batch must be at least 1, got 0"):
        PositionSampler(model, 0)
    with pytest.raises(ConfigurationError, match="positive, got 0"):
        PositionSampler(model, 4, "never")(0, torch.Generator())
