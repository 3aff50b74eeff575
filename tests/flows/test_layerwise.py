"""Derivatives of a flow layer by layer, against automatic differentiation of the whole."""

import pytest
import torch

from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training.layerwise import LayerwiseFlow

DESIGNS = {
    "trained linear layers between couplings": {
        "circular": "soft",
        "stiff": {"couplings": 3, "hidden": [8, 8], "mixing": "rank_one"},
    },
    "rotors after the core": {"circular": "soft", "stiff": {"couplings": 3, "hidden": [8, 8]}},
    "every torsion in one chain": {
        "circular": "all",
        "torsions": {"couplings": 3, "components": 3, "hidden": [8], "learn_steepness": True, "rotors_last": False},
        "stiff": {"couplings": 2, "hidden": [8]},
    },
    "the paper's": {
        "circular": "all",
        "torsions": {"couplings": 2, "components": 3, "hidden": [8]},
        "stiff": {
            "map": "interval",
            "transform": "bumps",
            "components": 3,
            "couplings": 3,
            "split": "angles_then_bonds",
            "hidden": [8],
        },
    },
}


@pytest.fixture(scope="module", params=[*DESIGNS])
def flow(request, generator_of):
    design = FlowConfiguration.model_validate(DESIGNS[request.param])
    flow = generator_of("CCO", design).flow
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return flow


@pytest.fixture(scope="module")
def latent(flow):
    return flow.sample_latent(40, torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max().clamp_min(1e-12))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0.0, atol=1e-8)


def test_log_prob_and_score_are_those_of_the_flow(flow, latent):
    with torch.no_grad():
        coordinates, _ = flow(latent)
    layers = LayerwiseFlow(flow, coordinates)
    leaves = Coordinates(*(part.clone().requires_grad_(True) for part in coordinates))
    log_prob = flow.log_prob(leaves)
    close(layers.log_prob, log_prob.detach())
    for found, expected in zip(layers.score(), torch.autograd.grad(log_prob.sum(), leaves), strict=True):
        close(found, expected)


def test_path_gradient_is_that_of_the_sampling_direction(flow, latent):
    generator = torch.Generator().manual_seed(2)
    coordinates, _ = flow(latent)
    cotangent = Coordinates(*(torch.randn(part.shape, generator=generator).to(part.dtype) for part in coordinates))
    along = sum((a * b).sum() for a, b in zip(coordinates, cotangent, strict=True))
    parameters = list(flow.parameters())
    expected = torch.autograd.grad(along, parameters, materialize_grads=True)
    layers = LayerwiseFlow(flow, Coordinates(*(part.detach() for part in coordinates)))
    found = {id(parameter): gradient for parameter, gradient in layers.path_gradient(cotangent)}
    assert len(found) == len(parameters)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[id(parameter)] / scale, gradient / scale, rtol=0.0, atol=1e-8)


def test_frozen_parameters_get_no_gradient(flow, latent):
    with torch.no_grad():
        coordinates, _ = flow(latent)
    first = next(flow.parameters())
    first.requires_grad_(False)
    try:
        trained = {id(parameter) for parameter, _ in LayerwiseFlow(flow, coordinates).path_gradient(coordinates)}
    finally:
        first.requires_grad_(True)
    assert id(first) not in trained
    assert len(trained) == len(list(flow.parameters())) - 1
