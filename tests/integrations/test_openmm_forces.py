"""Potentials as OpenMM forces, on OpenMM's own platforms."""

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmm_contexts import context_of, evaluate

from flowbridge.core.errors import ConfigurationError, ModelFileError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.model_files.files import save
from flowbridge.core.potential import EnergyAndForces, Particles, Potential, PotentialMetadata
from flowbridge.integrations.openmm import add_potential, particle_system
from flowbridge.integrations.openmm.forces.computation import OpenMMEvaluator, PotentialComputation

CONFTEST = Path(__file__).parent.parent / "conftest.py"
unsaved = pytest.mark.filterwarnings("ignore:this potential is in no model file")


def expected(potential, positions, **parameters):
    result = potential.energy_and_forces(torch.as_tensor(positions).reshape(-1, *positions.shape[-2:]), **parameters)
    return float(result.energy.sum()), result.forces.numpy().reshape(-1, 3)


def relative_error(forces, reference):
    return np.linalg.norm(forces - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize(("platform", "tolerance"), [("Reference", 1e-12), ("CPU", 2e-5)])
def test_energy_and_forces_are_the_potentials(morse, morse_file, alanine, platform, tolerance):
    system = particle_system(morse_file)
    add_potential(system, morse_file, topology=alanine.topology)
    context = context_of(system, platform)
    for positions in alanine.shaken(5):
        energy, forces = evaluate(context, positions)
        reference, reference_forces = expected(morse, positions)
        assert energy == pytest.approx(reference, rel=tolerance)
        assert relative_error(forces, reference_forces) < tolerance


def test_energy_conservation_is_that_of_the_integrator(morse_file, alanine):
    """The fluctuation of the total energy falls with the square of the time step, and nothing drifts."""

    def total_energies(step):
        system = particle_system(morse_file)
        add_potential(system, morse_file)
        context = context_of(system, step=step)
        context.setPositions(alanine.positions)
        context.setVelocitiesToTemperature(300, 7)
        totals = []
        for _ in range(int(1.0 / step / 4)):
            context.getIntegrator().step(4)
            state = context.getState(getEnergy=True)
            total = state.getPotentialEnergy() + state.getKineticEnergy()
            totals.append(total.value_in_unit(unit.kilojoule_per_mole))
        return np.array(totals)

    coarse, fine = total_energies(0.0008), total_energies(0.0004)
    assert fine.std() < 0.5
    assert 2.5 < coarse.std() / fine.std() < 6.0
    halves = np.array_split(fine, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < fine.std()


def test_xml_round_trip(morse_file, alanine):
    system = particle_system(morse_file)
    force = add_potential(system, morse_file, force_group=3, scale_parameter="lambda_flow", dtype="float64")
    xml = openmm.XmlSerializer.serialize(system)
    assert len(xml) < 8000
    restored = openmm.XmlSerializer.deserialize(xml)
    assert openmm.XmlSerializer.serialize(restored) == xml
    assert restored.getForce(0).getForceGroup() == force.getForceGroup() == 3
    context, again = context_of(system), context_of(restored)
    for each in (context, again):
        each.setPositions(alanine.positions)
        each.setParameter("lambda_flow", 0.25)
    for positions in alanine.shaken(3):
        first, second = evaluate(context, positions), evaluate(again, positions)
        assert first[0] == second[0]
        np.testing.assert_array_equal(first[1], second[1])


def test_xml_is_read_in_another_process(morse, morse_file, alanine, tmp_path):
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "positions.npy", alanine.shaken(1)[0])
    script = (
        "import runpy, sys, numpy as np, openmm\n"
        f"runpy.run_path({str(CONFTEST)!r})\n"
        "system = openmm.XmlSerializer.deserialize(open('system.xml').read())\n"
        "platform = openmm.Platform.getPlatformByName('Reference')\n"
        "context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)\n"
        "context.setPositions(np.load('positions.npy'))\n"
        "print(repr(context.getState(getEnergy=True).getPotentialEnergy()._value))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(expected(morse, alanine.shaken(1)[0])[0], rel=1e-12)


def test_deepcopy_of_system_and_a_copy_of_the_copy(morse_file, alanine):
    system = particle_system(morse_file)
    add_potential(system, morse_file, topology=alanine.topology)
    copied = copy.deepcopy(copy.deepcopy(system))
    positions = alanine.shaken(1)[0]
    assert evaluate(context_of(copied), positions)[0] == evaluate(context_of(system), positions)[0]


def test_inside_custom_cv_force(morse, morse_file, alanine):
    inner = particle_system(morse_file)
    add_potential(inner, morse_file, scale_parameter="flow_scale")
    system = particle_system(morse_file)
    collective = openmm.CustomCVForce("0.5*flow^2")
    collective.addCollectiveVariable("flow", copy.deepcopy(inner.getForce(0)))
    system.addForce(collective)
    context = context_of(system)
    positions = alanine.shaken(1)[0]
    reference, forces = expected(morse, positions)
    energy, found = evaluate(context, positions)
    assert energy == pytest.approx(0.5 * reference**2, rel=1e-12)
    assert relative_error(found, reference * forces) < 1e-12
    context.setParameter("flow_scale", 0.5)
    assert evaluate(context, positions)[0] == pytest.approx(0.125 * reference**2, rel=1e-12)


def test_pickle_is_small_and_byte_stable(morse_file, alanine, monkeypatch):
    pickles = []
    for path in (str(morse_file), Path(morse_file), Path(morse_file.name)):
        if not Path(path).is_absolute():
            monkeypatch.chdir(morse_file.parent)
        system = particle_system(path)
        xml = openmm.XmlSerializer.serialize(add_potential(system, path))
        pickles.append(bytes.fromhex(re.search('function="([0-9a-f]+)"', xml)[1]))
    assert len(set(pickles)) == 1
    assert len(pickles[0]) < 2000
    assert pickle.dumps(pickle.loads(pickles[0])) == pickles[0]  # noqa: S301


def test_object_that_is_in_no_file_runs_but_says_why_it_cannot_be_serialised(morse, alanine, tmp_path):
    system = particle_system(morse)
    with pytest.warns(UserWarning, match=r"Save it first with flowbridge\.save"):
        add_potential(system, morse)
    positions = alanine.shaken(1)[0]
    assert evaluate(context_of(system), positions)[0] == pytest.approx(expected(morse, positions)[0], rel=1e-12)
    with pytest.raises(openmm.OpenMMException, match="could not be pickled"):
        openmm.XmlSerializer.serialize(system)

    save(morse, tmp_path / "saved.flow")
    system = particle_system(morse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_potential(system, morse)
    assert evaluate(context_of(copy.deepcopy(system)), positions)[0] == pytest.approx(expected(morse, positions)[0])

    with torch.no_grad():
        morse.bond_lengths.add_(0.001)
    with pytest.warns(UserWarning, match="has changed since"):
        add_potential(particle_system(morse), morse)


@pytest.mark.parametrize("change", ["another model", "truncated", "gone"])
@pytest.mark.parametrize("filter_action", ["always", "error"])
def test_changed_model_file_is_refused(morse_file, morse, alanine, change, filter_action):
    """OpenMM ends the process when unpickling raises: so a warning now, an error at the first force."""
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    xml = openmm.XmlSerializer.serialize(system)
    original = morse_file.read_bytes()
    if change == "another model":
        with torch.no_grad():
            morse.bond_lengths.mul_(1.01)
        save(morse, morse_file)
    elif change == "truncated":
        morse_file.write_bytes(original[:-7])
    else:
        morse_file.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filter_action)
        restored = openmm.XmlSerializer.deserialize(xml)
    if filter_action == "always":
        assert [str(morse_file) in str(entry.message) for entry in caught] == [True]
    reason = {"another model": "digest", "truncated": "truncated", "gone": "no such model file"}[change]
    with pytest.raises(openmm.OpenMMException, match=reason) as caught_error:
        evaluate(context_of(restored), alanine.positions)
    assert str(morse_file) in str(caught_error.value)
    # Nothing is lost: with the file back, the same System works.
    morse_file.write_bytes(original)
    assert evaluate(context_of(copy.deepcopy(restored)), alanine.positions)[0] == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module")
def amber_pair(alanine):
    """Two copies of the molecule with Amber ff96, 2 nm apart: topology, System, positions."""
    modeller = app.Modeller(alanine.topology, alanine.positions * unit.nanometer)
    modeller.add(alanine.topology, (alanine.positions + np.array([0.0, 2.0, 0.0])) * unit.nanometer)
    system = app.ForceField("amber96.xml").createSystem(modeller.topology, constraints=None)
    return modeller.topology, system, np.array(modeller.positions.value_in_unit(unit.nanometer))


def test_subset_inside_an_amber_system(amber_pair, morse, morse_file, alanine):
    topology, system, positions = amber_pair
    positions = positions + 0.005 * np.random.default_rng(3).standard_normal(positions.shape)
    plain = evaluate(context_of(system), positions)
    second = list(range(22, 44))
    system = copy.deepcopy(system)
    add_potential(system, morse_file, topology=topology, particles=second, force_group=5)
    context = context_of(system)
    together = evaluate(context, positions)
    energy, forces = expected(morse, positions[second])
    assert together[0] - plain[0] == pytest.approx(energy, rel=1e-9)
    np.testing.assert_array_equal((together[1] - plain[1])[:22], 0.0)
    assert relative_error((together[1] - plain[1])[22:], forces) < 1e-10
    alone = evaluate(context, positions, groups={5})
    assert alone[0] == pytest.approx(energy, rel=1e-12)
    assert evaluate(context, positions, groups={0})[0] == pytest.approx(plain[0], rel=1e-12)


def test_particles_in_an_order_of_their_own(morse, morse_file, alanine):
    order = np.random.default_rng(5).permutation(22)
    system = openmm.System()
    for index in order:
        system.addParticle(alanine.particles.masses[index])
    add_potential(system, morse_file, particles=np.argsort(order))
    positions = alanine.shaken(1)[0]
    energy, forces = evaluate(context_of(system), positions[order])
    reference, reference_forces = expected(morse, positions)
    assert energy == pytest.approx(reference, rel=1e-12)
    assert relative_error(forces, reference_forces[order]) < 1e-12


def test_scale_and_global_parameters(morse, morse_file, alanine):
    system = particle_system(morse_file)
    force = add_potential(system, morse_file, scale_parameter="flow_scale")
    assert dict(force.getGlobalParameters()) == {"flow_scale": 1.0, "stiffness": 1.0}
    context = context_of(system)
    positions = alanine.shaken(1)[0]
    for scale, stiffness in [(1.0, 1.0), (0.3, 1.0), (0.3, 2.5), (-1.0, 1.0), (0.0, 1.0)]:
        context.setParameter("flow_scale", scale)
        context.setParameter("stiffness", stiffness)
        reference, forces = expected(morse, positions, stiffness=stiffness)
        energy, found = evaluate(context, positions)
        assert energy == pytest.approx(scale * reference, rel=1e-12)
        np.testing.assert_allclose(found, scale * forces, rtol=1e-10, atol=1e-9)
    system = particle_system(morse_file)
    assert dict(add_potential(system, morse_file).getGlobalParameters()) == {"stiffness": 1.0}
    assert evaluate(context_of(system), positions)[0] == pytest.approx(expected(morse, positions)[0], rel=1e-12)


def test_replicas_are_one_batch_and_their_energies_add(morse, morse_file, alanine):
    positions = alanine.shaken(4)
    system = particle_system(morse_file, replicas=4)
    add_potential(system, morse_file, replicas=4)
    energy, forces = evaluate(context_of(system), positions.reshape(-1, 3))
    reference, reference_forces = expected(morse, positions)
    assert energy == pytest.approx(reference, rel=1e-12)
    assert relative_error(forces, reference_forces) < 1e-12
    single = particle_system(morse_file)
    add_potential(single, morse_file)
    assert energy == pytest.approx(sum(evaluate(context_of(single), each)[0] for each in positions), rel=1e-12)
    with pytest.raises(MoleculeMismatchError, match=r"88 particles \(4 replicas of 22\)"):
        add_potential(single, morse_file, replicas=4)


class Probe(Potential):
    """Does what it is told at each evaluation, by numbers of the evaluation."""

    def __init__(self, particles, behaviour):
        super().__init__()
        self.metadata = PotentialMetadata(particles)
        self.behaviour = behaviour
        self.calls = 0

    def energy_and_forces(self, positions, cell=None):
        self.calls += 1
        return self.behaviour(self.calls, positions)


def still(positions):
    return EnergyAndForces(positions.new_zeros(len(positions)), torch.zeros_like(positions))


def nan_energy(calls, positions):
    energy, forces = still(positions)
    return EnergyAndForces(energy * float("nan"), forces) if calls > 7 else EnergyAndForces(energy, forces)


def infinite_force(calls, positions):
    energy, forces = still(positions)
    if calls > 7:
        forces[0, 8, 1] = float("inf")
    return EnergyAndForces(energy, forces)


def huge_force(calls, positions):
    energy, forces = still(positions)
    if calls > 7:
        forces[0, 8, 1] = -3e9
    return EnergyAndForces(energy, forces)


def key_error(calls, positions):
    return {}["k"] if calls > 7 else still(positions)


def wrong_shape(calls, positions):
    energy, forces = still(positions)
    return EnergyAndForces(energy, forces[:, :1]) if calls > 7 else EnergyAndForces(energy, forces)


@unsaved
@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        (nan_energy, "Probe gives an energy of nan kJ/mol at finite positions"),
        (infinite_force, r"NaN or infinite forces on 1 of 22 particles, first CA \(atom 8 of ALA 2\)"),
        (huge_force, r"first CA \(atom 8 of ALA 2\) exceed 2.1e\+09 kJ/mol/nm"),
        (key_error, "KeyError: 'k'"),
        (wrong_shape, r"forces of shape \(1, 1, 3\) for positions of shape \(1, 22, 3\)"),
    ],
)
def test_failure_stops_the_run_with_step_cause_and_traceback(alanine, behaviour, cause):
    system = particle_system(probe := Probe(alanine.particles, behaviour))
    add_potential(system, probe)
    context = context_of(system)
    context.setPositions(alanine.positions)
    with pytest.raises(openmm.OpenMMException, match=cause) as caught:
        context.getIntegrator().step(100)
    assert probe.calls == 8
    assert "flowbridge stopped the run at step 7 (time 0.0035 ps)" in str(caught.value)
    assert "Traceback (most recent call last)" in str(caught.value)
    if behaviour is key_error:
        assert "in key_error" in str(caught.value)


def test_nan_positions_are_named_as_the_cause(morse_file, alanine):
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    context = context_of(system)
    positions = alanine.positions.copy()
    positions[4, 2] = np.nan
    with pytest.raises(openmm.OpenMMException, match=r"positions of 1 of 22 particles, first C \(atom 4 of ACE 1\)"):
        evaluate(context, positions)
    # The same Context goes on with sound positions.
    assert evaluate(context, alanine.positions)[0] == pytest.approx(0.0, abs=1e-9)


def test_inside_custom_cv_force_the_time_is_named(morse_file, alanine):
    inner, system = particle_system(morse_file), particle_system(morse_file)
    add_potential(inner, morse_file)
    collective = openmm.CustomCVForce("flow")
    collective.addCollectiveVariable("flow", copy.deepcopy(inner.getForce(0)))
    system.addForce(collective)
    context = context_of(system)
    context.setPositions(alanine.positions)
    context.getIntegrator().step(3)
    context.setPositions(alanine.positions * np.nan)
    with pytest.raises(openmm.OpenMMException, match=r"at time 0\.0015 ps .steps are not counted"):
        context.getIntegrator().step(1)


@unsaved
def test_particles_added_later_are_an_error_and_no_memory_is_overrun(morse, alanine):
    system = particle_system(morse)
    add_potential(system, morse)
    for _ in range(1000):
        system.addParticle(1.0)
    with pytest.raises(openmm.OpenMMException, match="made for 22 particles but the System now has 1022"):
        evaluate(context_of(system), np.zeros((1022, 3)))


def renamed(topology, changes):
    """Return a copy of ``topology`` with the elements of some atoms changed."""
    changed = copy.deepcopy(topology)
    for atom in changed.atoms():
        if atom.index in changes:
            atom.element = changes[atom.index]
    return changed


def swapped(topology, i, j):
    """Return a copy of ``topology`` in which atoms i and j have exchanged their bonds."""
    atoms = list(topology.atoms())
    order = {i: j, j: i}
    result = app.Topology()
    residue = result.addResidue("MOL", result.addChain())
    new = [result.addAtom(atom.name, atom.element, residue) for atom in atoms]
    for bond in topology.bonds():
        a, b = bond.atom1.index, bond.atom2.index
        result.addBond(new[order.get(a, a)], new[order.get(b, b)])
    return result


def test_mismatched_molecules_are_refused(morse_file, alanine, amber_pair):
    topology, pair, _ = amber_pair
    bare = particle_system(morse_file)
    with pytest.raises(MoleculeMismatchError, match=r"22 particles but the System has 44: name the ones"):
        add_potential(pair, morse_file, topology=topology)
    with pytest.raises(MoleculeMismatchError, match="names 21 particles but the potential acts on 22"):
        add_potential(pair, morse_file, topology=topology, particles=range(21))
    with pytest.raises(MoleculeMismatchError, match=r"22 atoms but the System has 44"):
        add_potential(pair, morse_file, topology=alanine.topology, particles=range(22))
    with pytest.raises(MoleculeMismatchError, match=r"particle 8 .* has Si where the potential has C, CA \(atom 8"):
        add_potential(bare, morse_file, topology=renamed(alanine.topology, {8: app.element.silicon}))
    with pytest.raises(MoleculeMismatchError, match="has no element where"):
        add_potential(bare, morse_file, topology=renamed(alanine.topology, {0: None}))
    with pytest.raises(MoleculeMismatchError, match="the order of the atoms differs"):
        add_potential(bare, morse_file, topology=swapped(alanine.topology, 1, 20))
    with pytest.raises(MoleculeMismatchError, match="where the potential has"):
        add_potential(pair, morse_file, topology=topology, particles=range(1, 23))
    assert bare.getNumForces() == 0


def test_masses_are_compared_where_there_is_no_topology(morse_file, alanine):
    repartitioned = particle_system(morse_file, hydrogen_mass=3.0)
    add_potential(repartitioned, morse_file)
    frozen = particle_system(morse_file)
    frozen.setParticleMass(6, 0.0)
    add_potential(frozen, morse_file)
    shifted = openmm.System()
    for mass in np.roll(alanine.particles.masses, 1):
        shifted.addParticle(mass)
    with pytest.raises(MoleculeMismatchError, match="give topology="):
        add_potential(shifted, morse_file)
    heavy = particle_system(morse_file)
    heavy.setParticleMass(9, 2.014)
    with pytest.raises(MoleculeMismatchError, match=r"particle 8 \(with its hydrogens\) weighs 14\.025"):
        add_potential(heavy, morse_file)
    add_potential(heavy, morse_file, topology=alanine.topology)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": [*range(21), 20]}, "named more than once"),
        ({"particles": [*range(21), 22]}, r"outside the System, which has particles 0\.\.21"),
        ({"particles": [*range(21), -1]}, "outside the System"),
        ({"particles": [*range(21), 20.5]}, "whole numbers"),
        ({"backend": "jax"}, "'jax' is not known: use 'auto' or one of 'python', 'torchforce'"),
        ({"backend": "python", "parameter_derivatives": ["stiffness"]}, "use backend='torchforce'"),
        ({"dtype": "int32"}, "dtype must be float32, float64 or None"),
        ({"force_group": 32}, "between 0 and 31"),
        ({"replicas": 0}, "at least 1"),
        ({"scale_parameter": "stiffness"}, "choose another scale_parameter"),
    ],
)
def test_unusable_arguments(morse_file, arguments, message):
    system = particle_system(morse_file)
    with pytest.raises(ConfigurationError, match=message):
        add_potential(system, morse_file, **arguments)
    assert system.getNumForces() == 0


def test_unusable_potentials(alanine, tmp_path, morse_file):
    with pytest.raises(ConfigurationError, match="path of a model file, not a dict"):
        add_potential(particle_system(morse_file), {})
    with pytest.raises(ModelFileError, match="no such model file"):
        add_potential(particle_system(morse_file), tmp_path / "absent.flow")


def test_constraints_and_virtual_sites_are_refused(alanine, morse_file):
    constrained = app.ForceField("amber96.xml").createSystem(alanine.topology, constraints=app.HBonds)
    with pytest.raises(ConfigurationError, match=r"constrains 12 distances .* constraints=None"):
        add_potential(constrained, morse_file, topology=alanine.topology)
    virtual = particle_system(morse_file)
    virtual.setParticleMass(3, 0.0)
    virtual.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ConfigurationError, match="particle 3 is a virtual site"):
        add_potential(virtual, morse_file)
    # Constraints elsewhere in the System are nobody's concern.
    elsewhere = particle_system(morse_file)
    elsewhere.addParticle(1.0), elsewhere.addParticle(1.0)
    elsewhere.addConstraint(22, 23, 0.1)
    add_potential(elsewhere, morse_file, particles=range(22))


@unsaved
@pytest.mark.parametrize("replicas", [1, 2])
def test_periodic_potential_gets_the_cell(fluid, replicas):
    system = particle_system(fluid, replicas=replicas)
    system.setDefaultPeriodicBoxVectors([1.5, 0, 0], [0.2, 1.4, 0], [-0.3, 0.1, 1.6])
    force = add_potential(system, fluid, replicas=replicas)
    assert force.usesPeriodicBoundaryConditions()
    context = context_of(system)
    positions = np.random.default_rng(1).random((replicas, 12, 3)) * 1.5
    cell = torch.tensor([[1.5, 0, 0], [0.2, 1.4, 0], [-0.3, 0.1, 1.6]], dtype=torch.float64)
    for box in (cell, cell * 1.1):
        context.setPeriodicBoxVectors(*box.tolist())
        result = fluid.energy_and_forces(torch.tensor(positions), box.expand(replicas, 3, 3))
        energy, forces = evaluate(context, positions.reshape(-1, 3))
        assert energy == pytest.approx(float(result.energy.sum()), rel=1e-12)
        assert relative_error(forces, result.forces.numpy().reshape(-1, 3)) < 1e-12
        moved = positions + box[0].numpy() - 2 * box[2].numpy()
        assert evaluate(context, moved.reshape(-1, 3))[0] == pytest.approx(energy, rel=1e-12)


@unsaved
def test_periodic_potential_runs_under_a_barostat(fluid):
    system = particle_system(fluid)
    add_potential(system, fluid)
    system.addForce(openmm.MonteCarloBarostat(100.0, 100.0, 2))
    system.setDefaultPeriodicBoxVectors([1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5])
    context = context_of(system, step=0.002)
    context.setPositions(np.random.default_rng(1).random((12, 3)) * 1.5)
    context.setVelocitiesToTemperature(100.0, 3)
    context.getIntegrator().step(200)
    state = context.getState(getEnergy=True, getPositions=True)
    box = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer)
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    assert box[0, 0] != 1.5
    reference = fluid(torch.tensor(np.array(positions))[None], torch.tensor(np.array(box))[None])
    assert state.getPotentialEnergy()._value == pytest.approx(float(reference.detach()), rel=1e-9)


@unsaved
def test_contradicting_boundaries_are_refused(fluid, morse_file, alanine):
    open_system = particle_system(fluid)
    nonbonded = openmm.NonbondedForce()
    for _ in range(12):
        nonbonded.addParticle(0.0, 0.3, 0.0)
    open_system.addForce(nonbonded)
    with pytest.raises(ConfigurationError, match="the potential is periodic but the System's NonbondedForce is not"):
        add_potential(open_system, fluid)

    def in_a_box():
        system = particle_system(morse_file)
        walls = openmm.CustomExternalForce("periodicdistance(x, y, z, 0, 0, 0)")
        system.addForce(walls)
        return system

    with pytest.raises(ConfigurationError, match=r"no chain of bonds .*HarmonicBondForce with force constant 0"):
        add_potential(in_a_box(), morse_file)
    joined = in_a_box()
    bonds = openmm.HarmonicBondForce()
    for i, j in alanine.particles.bonds:
        bonds.addBond(i, j, 0.0, 0.0)
    joined.addForce(bonds)
    add_potential(joined, morse_file)


def test_contexts_in_two_threads_do_not_disturb_each_other(morse_file, alanine):
    """Both Contexts call the same function object, and OpenMM releases the interpreter lock around it."""
    system = particle_system(morse_file)
    add_potential(system, morse_file)

    def run(seed):
        context = context_of(system)
        context.setPositions(alanine.shaken(1, seed=seed)[0])
        context.setVelocitiesToTemperature(300.0, seed)
        context.getIntegrator().step(300)
        return context.getState(getPositions=True).getPositions(asNumpy=True)._value.copy()

    alone = [run(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (1, 2)))
    for first, second in zip(alone, together, strict=True):
        np.testing.assert_array_equal(first, second)


@unsaved
def test_float32_leaves_the_users_potential_alone(morse, alanine):
    system = particle_system(morse)
    add_potential(system, morse, dtype=torch.float32)
    assert morse.bond_lengths.dtype == torch.float64
    positions = alanine.shaken(1)[0]
    energy, forces = evaluate(context_of(system), positions)
    reference, reference_forces = expected(morse, positions)
    assert 0 < abs(energy - reference) < 1e-4 * reference
    assert 1e-10 < relative_error(forces, reference_forces) < 1e-4


def test_thread_count_and_random_state_of_torch_are_left_alone(morse_file, alanine):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    evaluate(context_of(system), alanine.positions)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


class PublicState:
    """A State of which only the public interface is there, as in an OpenMM that lost the private one."""

    def __init__(self, state):
        self.state = state

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.state, name)


def test_public_interface_gives_the_same(morse, alanine):
    system = particle_system(morse)
    computation = PotentialComputation(OpenMMEvaluator(morse))
    context = context_of(system)
    context.setPositions(alanine.shaken(1)[0])
    for name, value in morse.metadata.global_parameters.items():
        force = openmm.CustomExternalForce("0")
        force.addGlobalParameter(name, value)
        system.addForce(force)
    context = context_of(system)
    context.setPositions(alanine.shaken(1)[0])
    state = context.getState(getPositions=True, getParameters=True)
    raw, public = computation(state), computation(PublicState(state))
    assert raw[0] == public[0] == pytest.approx(expected(morse, alanine.shaken(1)[0])[0], rel=1e-12)
    np.testing.assert_array_equal(raw[1], public[1])
    other = openmm.Context(particle_system(morse, replicas=2), openmm.VerletIntegrator(0.001))
    other.setPositions(np.zeros((44, 3)))
    with pytest.raises(Exception, match="made for 22 particles but the System now has 44"):
        computation(PublicState(other.getState(getPositions=True)))


def test_particle_system(morse, alanine):
    def masses(system):
        return np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])

    np.testing.assert_allclose(masses(particle_system(morse)), alanine.particles.masses)
    heavy = masses(particle_system(morse, replicas=3, hydrogen_mass=2.5))
    assert heavy.shape == (66,)
    np.testing.assert_array_equal(heavy[:22], heavy[44:])
    numbers = np.array(alanine.particles.atomic_numbers)
    np.testing.assert_allclose(heavy[:22][numbers == 1], 2.5)
    assert heavy[:22].sum() == pytest.approx(sum(alanine.particles.masses))
    reference = app.ForceField("amber96.xml").createSystem(alanine.topology, hydrogenMass=2.5)
    np.testing.assert_allclose(heavy[:22], masses(reference), atol=0.02)
    with pytest.raises(ConfigurationError, match=r"CH3 \(atom 0 of ACE 1\) would have a mass of -.*hydrogen_mass=6"):
        particle_system(morse, hydrogen_mass=6.0)
    with pytest.raises(ConfigurationError, match="at least 1"):
        particle_system(morse, replicas=0)
    beads = Probe(Particles(("A", "B"), (0, 0), (30.0, 40.0)), nan_energy)
    np.testing.assert_array_equal(masses(particle_system(beads)), [30.0, 40.0])
    with pytest.raises(ConfigurationError, match="needs bonds"):
        particle_system(beads, hydrogen_mass=2.0)


def test_importing_the_package_needs_no_torch():
    script = "import flowbridge.integrations.openmm, flowbridge.calculators, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False).returncode == 0


def test_errors_raised_directly_keep_their_type_and_cause(alanine):
    probe = Probe(alanine.particles, lambda calls, positions: nan_energy(9, positions))
    computation = PotentialComputation(OpenMMEvaluator(probe))
    context = context_of(particle_system(probe))
    context.setPositions(alanine.positions)
    with pytest.raises(NonFiniteEnergyError) as caught:
        computation(context.getState(getPositions=True))
    assert isinstance(caught.value.__cause__, NonFiniteEnergyError)


def test_what_a_reporter_asks_for_is_not_computed_again(morse, morse_file, alanine, monkeypatch):
    calls = []
    original = type(morse).energy_and_forces

    def counted(self, *arguments, **parameters):
        calls.append(1)
        return original(self, *arguments, **parameters)

    monkeypatch.setattr(type(morse), "energy_and_forces", counted)

    def run(report):
        calls.clear()
        system = particle_system(morse_file)
        add_potential(system, morse_file, scale_parameter="flow_scale")
        context = context_of(system)
        context.setPositions(alanine.shaken(1)[0])
        for _ in range(20):
            context.getIntegrator().step(1)
            if report:
                context.getState(getEnergy=True)
        return len(calls), context

    plain, context = run(report=False)
    reported, other = run(report=True)
    assert plain == 20
    assert reported <= 21
    np.testing.assert_array_equal(
        *(c.getState(getPositions=True).getPositions(asNumpy=True)._value for c in (context, other))
    )
    # Another value of a parameter is another point, at the same positions.
    energy = other.getState(getEnergy=True).getPotentialEnergy()._value
    other.setParameter("flow_scale", 0.5)
    assert other.getState(getEnergy=True).getPotentialEnergy()._value == pytest.approx(0.5 * energy)
    name = next(iter(morse.metadata.global_parameters))
    other.setParameter(name, 1.1 * other.getParameter(name))
    assert other.getState(getEnergy=True).getPotentialEnergy()._value != pytest.approx(0.5 * energy)


def test_an_object_may_be_trained_between_evaluations(morse, alanine):
    system = particle_system(morse)
    with pytest.warns(UserWarning, match="no model file"):
        add_potential(system, morse)
    context = context_of(system)
    before, _ = evaluate(context, alanine.shaken(1)[0])
    with torch.no_grad():
        next(morse.parameters()).mul_(1.5)
    after, _ = evaluate(context, alanine.shaken(1)[0])
    assert after != pytest.approx(before)
