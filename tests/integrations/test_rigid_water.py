"""Ice by GenIce in OpenMM: structure, energies and forces of rigid water."""

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.rigid.configuration import RigidFlowConfiguration
from flowbridge.flows.rigid.crystal import at_rest, from_flat
from flowbridge.flows.rigid.energies import BodyEnergy
from flowbridge.flows.rigid.generator import RigidBodyGenerator
from flowbridge.flows.rigid.relaxation import relaxed
from flowbridge.integrations.openmm import add_potential
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_langevin

pytest.importorskip("genice2", reason="GenIce2 is not installed: pip install 'flowbridge[flow-families]'")
from flowbridge.integrations.genice import ice_structure
from flowbridge.integrations.openmm.systems.rigid_water import RigidSystemEnergy, rigid_bodies, rigid_water


@pytest.fixture(scope="module")
def ice():
    return rigid_water(ice_structure("XI"), method="Ewald")


@pytest.fixture(scope="module")
def crystal(ice):
    return relaxed(
        BodyEnergy(ice.bodies, RigidSystemEnergy(ice.system, "Reference", 1)), ice.configuration, torch.tensor(ice.box)
    )


class TestStructure:
    def test_cell_and_density_of_ice_xi(self):
        structure = ice_structure("XI")
        assert np.allclose(np.diagonal(structure.cell), [0.89846, 0.77808, 0.73358])
        assert structure.density == pytest.approx(0.933, abs=0.001)
        assert len(ice_structure("XI", (2, 1, 1)).positions) == 32

    def test_every_oxygen_has_its_ice_rules(self, ice):
        """Two hydrogens of its own and two of neighbours within reach of a hydrogen bond."""
        places = ice.places.reshape(16, 4, 3)
        vectors = places[:, None, 1:3] - places[None, :, None, 0]
        vectors -= ice.box * np.round(vectors / ice.box)
        distances = np.linalg.norm(vectors, axis=-1)
        own = np.eye(16, dtype=bool)
        assert np.allclose(distances[own], 0.09572, atol=1e-6)
        received = (distances < 0.21) & ~own[:, :, None]
        assert (received.sum((0, 2)) == 2).all()

    def test_seeds_and_global_random_numbers(self):
        np.random.seed(3)  # noqa: NPY002
        expected = np.random.random()  # noqa: NPY002
        np.random.seed(3)  # noqa: NPY002
        first, again, other = (ice_structure("1h", seed=seed).rotations for seed in (1, 1, 2))
        assert np.random.random() == expected  # noqa: NPY002
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_refusals(self):
        with pytest.raises(ConfigurationError, match="no lattice"):
            ice_structure("no_such_ice")
        with pytest.raises(ConfigurationError, match="positive"):
            ice_structure("XI", (0, 1, 1))
        structure = ice_structure("XI")
        tilted = structure.cell.copy()
        tilted[1, 0] = 0.1
        with pytest.raises(ConfigurationError, match="orthorhombic"):
            rigid_water(type(structure)(structure.positions, structure.rotations, tilted, 0.9))


class TestEnergy:
    def test_the_bodies_are_those_of_the_constraints(self, ice):
        template = ice.bodies.template.numpy()
        angle = 2 * math.atan2(template[1, 1], template[1, 2] - template[0, 2])
        assert math.degrees(angle) == pytest.approx(104.52, abs=0.01)
        assert np.linalg.norm(template[3] - template[0]) == pytest.approx(0.0125, abs=1e-4)

    def test_energies_are_openmm_s(self, ice):
        context = openmm.Context(ice.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions(ice.places)
        context.computeVirtualSites()
        expected = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        found, _ = RigidSystemEnergy(ice.system, "Reference", 1).energies_and_forces(ice.places[None])
        assert found[0] == pytest.approx(expected, abs=1e-9)

    def test_forces_count_virtual_sites_once(self, ice, crystal):
        """Gradients by crystal coordinates against finite differences, away from the minimum."""
        energy = BodyEnergy(ice.bodies, RigidSystemEnergy(ice.system, "Reference", 1))
        flat = 0.02 * torch.randn(1, 93, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def value(x):
            return energy.energy_of(crystal.crystal.configuration(from_flat(x, 16)))

        leaf = flat.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
        for index in (0, 20, 44, 45, 60, 92):
            step = torch.zeros_like(flat)
            step[0, index] = 1e-5
            numeric = float(value(flat + step) - value(flat - step)) / 2e-5
            assert numeric == pytest.approx(float(gradient[0, index]), rel=1e-4, abs=0.02)

    def test_minimum(self, crystal):
        assert crystal.energy < -990.0
        assert torch.linalg.eigvalsh(crystal.curvature)[0] > 50.0
        assert crystal.curvature.shape == (93, 93)

    def test_systems_of_other_molecules_are_refused(self, ice):
        with pytest.raises(ConfigurationError, match="are not 15 rigid molecules"):
            rigid_bodies(ice.system, 15)
        loose = openmm.System()
        for _ in range(3):
            loose.addParticle(1.0)
        with pytest.raises(ConfigurationError, match="no constraint between"):
            rigid_bodies(loose, 1)


def test_trajectories_are_rigid_and_repeat(ice, crystal, tmp_path):
    places = ice.bodies.places(crystal.crystal.configuration(at_rest(16)))[0].numpy()
    run = LangevinRun(
        openmm.XmlSerializer.serialize(ice.system),
        places,
        100.0,
        0.002,
        2.0,
        50,
        20,
        5,
        1,
        tmp_path / "a.npz",
        platform="CPU",
    )
    first, second = run_langevin(run), run_langevin(run)
    assert np.array_equal(first.positions, second.positions)
    configuration = ice.bodies.configuration(torch.as_tensor(first.positions))
    moved = crystal.crystal.coordinates(configuration)
    assert 1e-3 < float(moved.displacements.abs().max()) < 0.1


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
def test_a_generator_of_ice_is_a_force(ice, crystal):
    """In a System with constraints and virtual sites: the forces on the sites give those of the bodies."""
    model = RigidBodyGenerator.harmonic(
        ice.particles, 100.0, ice.bodies, crystal.crystal, crystal.curvature, RigidFlowConfiguration(repetitions=1)
    )
    samples = model.sample(200, ice.system, seed=1)
    assert samples.effective_sample_size() > 5
    assert samples.reduced_potentials["target"].mean() < -900.0 / 0.8314 * 0.8
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(ice.system))
    while system.getNumForces():
        system.removeForce(0)
    add_potential(system, model, topology=ice.topology)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(samples.positions[0])
    energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert energy == pytest.approx(float(model(torch.as_tensor(samples.positions[:1])).detach()), abs=1e-3)
    # Dynamics without a thermostat keeps the energy, so constraints and virtual sites get the right share of the forces.
    context.setVelocitiesToTemperature(100.0, 1)
    total = []
    for _ in range(30):
        context.getIntegrator().step(2)
        state = context.getState(energy=True)
        total.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    kinetic = context.getState(energy=True).getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert np.ptp(total) < 0.03 * kinetic


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
def test_rigid_bodies_have_to_be_held(ice, crystal):
    model = RigidBodyGenerator.harmonic(ice.particles, 100.0, ice.bodies, crystal.crystal, crystal.curvature)
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(ice.system))
    while system.getNumConstraints():
        system.removeConstraint(0)
    with pytest.raises(ConfigurationError, match=r"neither constrained nor virtual sites, the first is 0"):
        add_potential(system, model, topology=ice.topology)
