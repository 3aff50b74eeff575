"""A compiled flow gives the numbers of the flow."""

import torch
from flowbridge.core.cache import Cache
from flowbridge.core.compilation.building import compiled
from flowbridge.core.compilation.compiled_potential import CompiledPotential
from flowbridge.flows.configuration import FlowConfiguration

SMALL = FlowConfiguration.model_validate(
    {
        "torsions": {"couplings": 2, "components": 4, "hidden": [16], "learn_steepness": True},
        "stiff": {"couplings": 2, "hidden": [16]},
    }
)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_single_precision_flow(generator_of, tmp_path):
    """The network of a flow runs in float32, its coordinates in float64: forces agree to float32 rounding."""
    cache = Cache(tmp_path, limit=2**30)
    flow = generator_of("CO", SMALL, torch.float32).requires_grad_(False)
    fast = compiled(flow, batch=1, cache=cache)
    assert isinstance(fast, CompiledPotential)
    generator = torch.Generator().manual_seed(9)
    usual = flow.sample_positions(40, generator).positions
    strained = usual + 0.01 * torch.randn(usual.shape, generator=generator, dtype=usual.dtype)
    for positions in (usual, strained):
        expected, found = flow.energy_and_forces(positions), fast.energy_and_forces(positions)
        assert relative(found.energy, expected.energy) < 1e-5
        largest = expected.forces.abs().amax((1, 2))
        assert float(((found.forces - expected.forces).abs().amax((1, 2)) / largest).max()) < 1e-5
    many = compiled(flow, batch=16, cache=cache)
    expected, found = flow.energy_and_forces(usual), many.energy_and_forces(usual)
    assert relative(found.energy, expected.energy) < 1e-5
    assert relative(found.forces, expected.forces) < 1e-5
    double = flow
    double.flow.double()
    fast = compiled(double, batch=1, cache=cache)
    for positions in (usual, strained):
        expected, found = double.energy_and_forces(positions), fast.energy_and_forces(positions)
        assert relative(found.energy, expected.energy) < 1e-10
        assert relative(found.forces, expected.forces) < 1e-10
