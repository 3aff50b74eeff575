"""A prior from a force field's own bonds and angles: its energies are OpenMM's, and no frame is looked at."""

import openmm
import pytest
import torch
from openmm import app

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.beads.mappings import centre_of_mass_mapping, five_beads
from flowbridge.integrations.openmm.forces.public_prior import public_prior


def system_of(molecule, constraints=None) -> openmm.System:
    return app.ForceField("amber99sbildn.xml").createSystem(molecule.topology, constraints=constraints)


def beads_alone(system: openmm.System, atoms: list[int]) -> openmm.System:
    """The System of the beads, with OpenMM's own bonds and angles between them."""
    number = {atom: bead for bead, atom in enumerate(atoms)}
    alone, bonds, angles = openmm.System(), openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for atom in atoms:
        alone.addParticle(system.getParticleMass(atom))
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for n in range(force.getNumBonds()):
                i, j, *rest = force.getBondParameters(n)
                if {i, j} <= number.keys():
                    bonds.addBond(number[i], number[j], *rest)
        if isinstance(force, openmm.HarmonicAngleForce):
            for n in range(force.getNumAngles()):
                i, j, k, *rest = force.getAngleParameters(n)
                if {i, j, k} <= number.keys():
                    angles.addAngle(number[i], number[j], number[k], *rest)
    alone.addForce(bonds)
    alone.addForce(angles)
    return alone


def test_energies_and_forces_are_those_of_openmm(alanine):
    mapping, whole = five_beads(alanine.particles), system_of(alanine)
    prior = public_prior(whole, mapping, 300.0)
    atoms = [int(mapping.members(bead)[0]) for bead in range(5)]
    system = beads_alone(whole, atoms)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    generator = torch.Generator().manual_seed(0)
    start = torch.from_numpy(mapping.positions(alanine.positions[None]))
    positions = start + 0.01 * torch.randn(5, 5, 3, generator=generator, dtype=torch.float64)
    energies, forces = prior.energy_and_forces(positions)
    for frame, energy, force in zip(positions, energies, forces, strict=True):
        context.setPositions(frame.numpy())
        state = context.getState(energy=True, forces=True)
        assert float(energy) == pytest.approx(state.getPotentialEnergy()._value, rel=1e-9)
        assert torch.allclose(force, torch.tensor(state.getForces(asNumpy=True)._value), rtol=1e-7, atol=1e-7)
    assert prior.metadata.temperature == 300.0


def test_bad_input(alanine):
    centres = centre_of_mass_mapping(alanine.particles, [range(6), range(6, 16), range(16, 22)])
    with pytest.raises(ConfigurationError, match="beads of one atom each"):
        public_prior(system_of(alanine), centres, 300.0)
    constrained = system_of(alanine, app.AllBonds)
    with pytest.raises(ConfigurationError, match=r"has no harmonic bond between .* without constraints"):
        public_prior(constrained, five_beads(alanine.particles), 300.0)
