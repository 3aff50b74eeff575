"""A compiled flow gives the numbers of the flow."""

import torch

from flowbridge.core.cache import Cache
from flowbridge.core.compilation.building import compiled
from flowbridge.core.compilation.compiled_potential import CompiledPotential
from flowbridge.flows.boltzmann.configuration import FlowConfiguration

SMALL = FlowConfiguration.model_validate(
    {
        "torsions": {"couplings": 2, "components": 4, "hidden": [16], "learn_steepness": True},
        "stiff": {"couplings": 2, "hidden": [16]},
    }
)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def usual_and_strained(flow):
    generator = torch.Generator().manual_seed(9)
    usual = flow.sample_positions(40, generator).positions
    return usual, usual + 0.01 * torch.randn(usual.shape, generator=generator, dtype=usual.dtype)


def test_single_precision_flow(generator_of, tmp_path):
    """The network of a flow runs in float32, its coordinates in float64: forces agree to float32 rounding."""
    flow = generator_of("CO", SMALL, torch.float32).requires_grad_(False)
    fast = compiled(flow, batch=1, cache=Cache(tmp_path, limit=2**30))
    assert isinstance(fast, CompiledPotential)
    for positions in usual_and_strained(flow):
        expected, found = flow.energy_and_forces(positions), fast.energy_and_forces(positions)
        assert relative(found.energy, expected.energy) < 1e-5
        largest = expected.forces.abs().amax((1, 2))
        assert float(((found.forces - expected.forces).abs().amax((1, 2)) / largest).max()) < 1e-5


def test_double_precision_flow_in_batches(generator_of, tmp_path):
    """Forty positions by a program for sixteen, whose vector code is another one than that for a single one."""
    flow = generator_of("CO", SMALL, torch.float32).requires_grad_(False)
    positions = usual_and_strained(flow)
    flow.flow.double()
    many = compiled(flow, batch=16, cache=Cache(tmp_path, limit=2**30))
    assert isinstance(many, CompiledPotential)
    for part in positions:
        expected, found = flow.energy_and_forces(part), many.energy_and_forces(part)
        assert relative(found.energy, expected.energy) < 1e-10
        assert relative(found.forces, expected.forces) < 1e-10
