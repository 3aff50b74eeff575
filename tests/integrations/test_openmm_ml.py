"""Model files through OpenMM-ML: whole Systems, and molecules within a force field's."""

import copy
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError
from flowbridge.core.model_files.files import save

pytest.importorskip("openmmml", reason="openmmml is not installed: pip install openmmml")
from openmmml import MLPotential

KJ = unit.kilojoule_per_mole


def context_of(system: openmm.System, positions: np.ndarray) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context


def energy_and_forces(context: openmm.Context) -> tuple[float, np.ndarray]:
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(KJ / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(KJ), forces


@pytest.fixture(scope="module")
def water_box(alanine) -> tuple[app.Topology, np.ndarray, openmm.System]:
    """Alanine dipeptide in a small box of rigid TIP3P water: topology, positions, and Amber's System with PME."""
    force_field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(alanine.topology, alanine.positions * unit.nanometer)
    modeller.addSolvent(force_field, boxSize=openmm.Vec3(2.2, 2.2, 2.2) * unit.nanometer)
    system = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=app.HBonds
    )
    context = context_of(system, modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 60)
    positions = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return modeller.topology, positions, system


def test_a_whole_system(alanine, morse, morse_file):
    system = MLPotential("flowbridge", modelPath=str(morse_file)).createSystem(alanine.topology)
    positions = alanine.shaken(1)[0]
    energy, forces = energy_and_forces(context_of(system, positions))
    expected = morse.energy_and_forces(torch.as_tensor(positions)[None])
    assert energy == pytest.approx(float(expected.energy), rel=1e-12)
    assert np.allclose(forces, expected.forces[0], rtol=1e-9, atol=1e-8)
    read = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    assert energy_and_forces(context_of(read, positions))[0] == pytest.approx(energy, rel=1e-14)


def hand_made(system: openmm.System, count: int) -> openmm.System:
    """Return the force field without its terms within the first ``count`` particles, which are one molecule."""
    rest = copy.deepcopy(system)
    for force in rest.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for i in range(force.getNumBonds()):
                a, b, length, constant = force.getBondParameters(i)
                force.setBondParameters(i, a, b, length, 0 * constant if max(a, b) < count else constant)
        elif isinstance(force, openmm.HarmonicAngleForce):
            for i in range(force.getNumAngles()):
                a, b, c, angle, constant = force.getAngleParameters(i)
                force.setAngleParameters(i, a, b, c, angle, 0 * constant if max(a, b, c) < count else constant)
        elif isinstance(force, openmm.PeriodicTorsionForce):
            for i in range(force.getNumTorsions()):
                *atoms, order, phase, constant = force.getTorsionParameters(i)
                force.setTorsionParameters(i, *atoms, order, phase, 0 * constant if max(atoms) < count else constant)
        elif isinstance(force, openmm.NonbondedForce):
            for a in range(count):
                for b in range(a):
                    force.addException(a, b, 0.0, 1.0, 0.0, True)
            force.setExceptionsUsePeriodicBoundaryConditions(True)
    return rest


@pytest.fixture(scope="module")
def made(water_box, shared_morse_file) -> list[openmm.System]:
    """Mixed Systems by OpenMM-ML, without and with interpolation."""
    topology, _, system = water_box
    potential = MLPotential("flowbridge", modelPath=shared_morse_file)
    return [potential.createMixedSystem(topology, system, range(22), interpolate=flag) for flag in (False, True)]


class TestMixedSystem:
    def test_energy_is_that_of_the_parts(self, water_box, made, morse):
        _, positions, system = water_box
        rest, rest_forces = energy_and_forces(context_of(hand_made(system, 22), positions))
        own = morse.energy_and_forces(torch.as_tensor(positions[:22])[None])
        for mixed in made:
            context = context_of(mixed, positions)
            if "lambda_interpolate" in context.getParameters():
                context.setParameter("lambda_interpolate", 1.0)
            energy, forces = energy_and_forces(context)
            assert energy == pytest.approx(rest + float(own.energy), abs=2e-3)
            expected = rest_forces.copy()
            expected[:22] += own.forces[0].numpy()
            assert np.abs(forces - expected).max() < 2e-3 * np.abs(expected).max()

    def test_interpolation_ends_at_the_force_field(self, water_box, made):
        _, positions, system = water_box
        context = context_of(made[1], positions)
        ends = {}
        for value in (0.0, 0.25, 1.0):
            context.setParameter("lambda_interpolate", value)
            ends[value] = energy_and_forces(context)[0]
        assert ends[0.0] == pytest.approx(energy_and_forces(context_of(system, positions))[0], abs=2e-3)
        assert ends[0.25] == pytest.approx(0.75 * ends[0.0] + 0.25 * ends[1.0], abs=5e-3)

    def test_the_molecule_stays_one_molecule(self, water_box, made):
        """Or a barostat would scale its atoms apart."""
        _, positions, _ = water_box
        for mixed in made:
            molecules = context_of(mixed, positions).getMolecules()
            assert tuple(range(22)) in [tuple(sorted(molecule)) for molecule in molecules]

    def test_constraints_within_the_molecule_are_gone(self, made, water_box):
        for mixed in made:
            pairs = [mixed.getConstraintParameters(i)[:2] for i in range(mixed.getNumConstraints())]
            assert pairs
            assert min(min(pair) for pair in pairs) >= 22
        assert min(water_box[2].getConstraintParameters(0)[:2]) < 22

    def test_dynamics_is_stable(self, water_box, made):
        _, positions, _ = water_box
        context = context_of(made[0], positions)
        context.setVelocitiesToTemperature(300.0, 1)
        start, _ = energy_and_forces(context)
        context.getIntegrator().step(60)
        end, forces = energy_and_forces(context)
        assert np.isfinite(forces).all()
        moved = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        bonds = np.linalg.norm(moved[[1, 4, 6, 8]] - moved[[0, 0, 4, 6]], axis=1)
        assert (bonds < 0.2).all()
        assert abs(end - start) < 0.5 * abs(start)


class TestBeads:
    def test_masses_come_from_the_model(self, alanine, morse, tmp_path):
        """A topology of beads has no elements, and OpenMM-ML gives such particles no mass."""
        particles = alanine.particles
        beads = copy.deepcopy(morse)
        beads.metadata = type(morse.metadata)(
            type(particles)(particles.names, (0,) * 22, particles.masses, particles.bonds),
            temperature=300.0,
            global_parameters=morse.metadata.global_parameters,
        )
        file = tmp_path / "beads.flow"
        save(beads, file)
        topology = app.Topology()
        residue = topology.addResidue("CG", topology.addChain())
        for name in particles.names:
            topology.addAtom(name, None, residue)
        system = MLPotential("flowbridge", modelPath=file).createSystem(topology)
        masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(22)]
        assert masses == pytest.approx(particles.masses)


class TestBadInput:
    def test_no_model(self):
        with pytest.raises(ValueError, match=r'a model file is needed: MLPotential\("flowbridge", modelPath='):
            MLPotential("flowbridge")

    def test_unknown_arguments(self, alanine, morse_file):
        with pytest.raises(ValueError, match="MLPotential got 'precision', which"):
            MLPotential("flowbridge", modelPath=morse_file, precision="single")
        with pytest.raises(ValueError, match="createSystem got 'charge', which"):
            MLPotential("flowbridge", modelPath=morse_file).createSystem(alanine.topology, charge=1)

    def test_another_molecule(self, alanine, morse_file):
        topology = app.Topology()
        residue = topology.addResidue("HOH", topology.addChain())
        topology.addAtom("O", app.element.oxygen, residue)
        with pytest.raises(MoleculeMismatchError):
            MLPotential("flowbridge", modelPath=morse_file).createSystem(topology)

    def test_a_periodic_model_needs_a_box(self, fluid, tmp_path):
        file = tmp_path / "fluid.flow"
        save(fluid, file)
        topology = app.Topology()
        residue = topology.addResidue("AR", topology.addChain())
        for _ in fluid.metadata.particles.names:
            topology.addAtom("Ar", app.element.argon, residue)
        with pytest.raises(ConfigurationError, match="topology has no box"):
            MLPotential("flowbridge", modelPath=file).createSystem(topology)


def test_importing_openmm_ml_imports_no_torch():
    """A broken torch must not take the other potentials with it."""
    known = "'flowbridge' in openmmml.MLPotential._implFactories"
    code = f"import sys; sys.modules['torch'] = None; import openmmml; print({known})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
