"""Boltzmann generator moves as openmmtools' moves: alone, in a sequence with dynamics, stored and read again."""

import pickle

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm import add_potential, particle_system

pytest.importorskip("openmmtools", reason="openmmtools is not installed: pip install openmmtools")
from openmmtools import cache, mcmc, states

import flowbridge
from flowbridge.integrations.openmmtools import BoltzmannMCMCMove

TEMPERATURE = 300.0
DESIGN = {
    "circular": "all",
    "torsions": {"couplings": 1, "components": 3, "hidden": [4]},
    "stiff": {"couplings": 1, "hidden": [4]},
}


@pytest.fixture(scope="module")
def generator_file(alanine, tmp_path_factory):
    """A flow in double precision, and its file."""
    design = FlowConfiguration.model_validate(DESIGN)
    model = BoltzmannGenerator.untrained(alanine.particles, TEMPERATURE, alanine.shaken(600), design)
    model.requires_grad_(False).double()
    file = tmp_path_factory.mktemp("models") / "alanine.flow"
    flowbridge.save(model, file)
    return model, file


@pytest.fixture
def state(generator_file):
    """Thermodynamic and sampler states of the flow's own energy: every independent proposal is accepted."""
    model, file = generator_file
    system = particle_system(model)
    add_potential(system, file)
    start = model.sample_positions(1, torch.Generator().manual_seed(1)).positions[0].numpy()
    return (
        states.ThermodynamicState(system, TEMPERATURE * unit.kelvin),
        states.SamplerState(start * unit.nanometer),
        contexts(),
    )


def contexts() -> cache.ContextCache:
    return cache.ContextCache(platform=openmm.Platform.getPlatformByName("Reference"))


def positions_of(sampler: states.SamplerState) -> np.ndarray:
    return sampler.positions.value_in_unit(unit.nanometer)


def test_all_proposals_of_the_exact_density_are_accepted(generator_file, state):
    thermodynamic, sampler, context_cache = state
    before = positions_of(sampler).copy()
    move = BoltzmannMCMCMove(generator_file[1], proposals=5, seed=1)
    move.apply(thermodynamic, sampler, context_cache)
    assert move.statistics.proposed == move.statistics.accepted == 5
    assert not np.allclose(before, positions_of(sampler))
    energy = sampler.potential_energy.value_in_unit(unit.kilojoule_per_mole)
    model = generator_file[0]
    assert energy == pytest.approx(float(model(torch.as_tensor(positions_of(sampler))[None])), rel=1e-6)


def test_in_a_sequence_with_dynamics(generator_file, state):
    thermodynamic, sampler, context_cache = state
    dynamics = mcmc.LangevinDynamicsMove(timestep=0.25 * unit.femtosecond, n_steps=5)
    move = BoltzmannMCMCMove(generator_file[1], seed=2)
    sampler_of_moves = mcmc.MCMCSampler(thermodynamic, sampler, move=mcmc.SequenceMove([dynamics, move]))
    sampler_of_moves.run(n_iterations=4, context_cache=context_cache)
    assert move.statistics.proposed == 4
    assert np.isfinite(positions_of(sampler_of_moves.sampler_state)).all()


def test_one_seed_one_chain_through_storage(generator_file, state):
    """The chain of random numbers goes on after pickling, where it was."""
    thermodynamic, sampler, context_cache = state
    start = positions_of(sampler).copy()

    def run(stored: bool) -> np.ndarray:
        sampler.positions = start * unit.nanometer
        move = BoltzmannMCMCMove(generator_file[1], seed=3, scale=0.3)
        move.apply(thermodynamic, sampler, context_cache)
        if stored:
            move = pickle.loads(pickle.dumps(move))  # noqa: S301 - our own
        move.apply(thermodynamic, sampler, context_cache)
        assert move.statistics.proposed == 2
        return positions_of(sampler).copy()

    assert np.array_equal(run(False), run(True))


def test_a_file_that_cannot_be_sampled(state, shared_morse_file):
    thermodynamic, sampler, context_cache = state
    with pytest.raises(ConfigurationError, match=r"holds .*MorseMolecule.*, not a Boltzmann generator"):
        BoltzmannMCMCMove(shared_morse_file).apply(thermodynamic, sampler, context_cache)
