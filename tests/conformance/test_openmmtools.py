"""openmmtools' own ways to an energy, on Systems whose force is a model."""

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from flowbridge.core.units import thermal_energy
from flowbridge.integrations.openmm import add_potential, particle_system

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
states = pytest.importorskip("openmmtools.states", reason="openmmtools is not installed: pip install openmmtools")
from openmmtools import cache, mcmc  # noqa: E402
from openmmtools.tests.test_alchemy import compute_energy, minimize  # noqa: E402


@pytest.fixture
def system(morse_file) -> openmm.System:
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    return system


def test_reduced_potentials_at_several_temperatures(system, morse, alanine):
    """ThermodynamicState, SamplerState and reduced_potential_at_states agree with the potential itself."""

    positions = alanine.shaken(1)[0]
    energy = morse(torch.as_tensor(positions)[None]).item()
    temperatures = (250.0, 300.0, 450.0)
    thermodynamic = [states.ThermodynamicState(system, t * unit.kelvin) for t in temperatures]
    sampler = states.SamplerState(positions * unit.nanometer)
    reduced = states.reduced_potential_at_states(sampler, thermodynamic, cache.ContextCache())
    assert np.allclose(reduced, [energy / thermal_energy(t) for t in temperatures], rtol=1e-6)
    for state, expected in zip(thermodynamic, reduced, strict=True):
        context = state.create_context(openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        sampler.apply_to_context(context)
        assert state.reduced_potential(context) == pytest.approx(expected, rel=1e-6)
        sampler.update_from_context(context)
        assert state.reduced_potential(sampler) == pytest.approx(expected, rel=1e-6)


def test_energies_of_copies_and_of_what_was_serialised(system, alanine):
    positions = alanine.shaken(1, seed=3)[0] * unit.nanometer
    reference = compute_energy(system, positions, openmm.Platform.getPlatform("Reference"))
    copies = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for name in ("Reference", "CPU"):
        found = compute_energy(copies, positions, openmm.Platform.getPlatform(name))
        assert found / reference == pytest.approx(1.0, abs=1e-4)
    lower = compute_energy(system, minimize(system, positions, openmm.Platform.getPlatform("Reference")))
    assert lower < reference


def test_its_langevin_move_samples_the_temperature(system, alanine):
    thermodynamic = states.ThermodynamicState(system, 300.0 * unit.kelvin)
    sampler = states.SamplerState(alanine.positions * unit.nanometer)
    move = mcmc.LangevinSplittingDynamicsMove(
        timestep=0.5 * unit.femtosecond, collision_rate=50.0 / unit.picosecond, n_steps=20, reassign_velocities=False
    )
    contexts = cache.ContextCache(platform=openmm.Platform.getPlatform("Reference"))
    kinetic = []
    for _ in range(200):
        move.apply(thermodynamic, sampler, context_cache=contexts)
        kinetic.append(sampler.kinetic_energy.value_in_unit(unit.kilojoule_per_mole))
    temperatures = np.array(kinetic[40:]) / (1.5 * len(alanine.particles) * thermal_energy(1.0))
    error = temperatures.std() / np.sqrt(len(temperatures) / 5)
    assert abs(temperatures.mean() - 300.0) < 4 * error
