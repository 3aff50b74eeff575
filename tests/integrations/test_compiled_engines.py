"""Engines that evaluate compiled potentials."""

import copy

import ase
import numpy as np
import openmm
import pytest
import torch
from ase import units
from openmm_contexts import context_of, evaluate

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.compilation.compiled_potential import CompiledPotential
from flowbridge.core.evaluator import EvaluationOptions, Evaluator
from flowbridge.integrations.openmm import add_potential, particle_system


@pytest.fixture
def file(compiled_morse_file, monkeypatch):
    """A model file, with a cache of compiled programs next to it, and models of files compiled."""
    file, *_ = compiled_morse_file
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(file.parent))
    monkeypatch.setenv("FLOWBRIDGE_COMPILE", "always")
    return file


def test_openmm(file, morse, alanine):
    system = particle_system(file)
    force = add_potential(system, file, topology=alanine.topology, scale_parameter="flow_scale")
    assert force is not None
    for positions in alanine.shaken(5, 0.01):
        x = torch.as_tensor(positions[None])
        expected = morse.energy_and_forces(x, stiffness=1.7)
        for one in (
            system,
            copy.deepcopy(system),
            openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system)),
        ):
            context = context_of(one)
            for name, value in {"stiffness": 1.7, "flow_scale": 0.5}.items():
                context.setParameter(name, value)
            energy, forces = evaluate(context, positions)
            assert energy == pytest.approx(0.5 * expected.energy.item(), rel=1e-10)
            np.testing.assert_allclose(forces, 0.5 * expected.forces[0].numpy(), rtol=1e-9, atol=1e-7)


def test_openmm_replicas(file, morse, alanine):
    system = particle_system(file, replicas=3)
    add_potential(system, file, replicas=3)
    positions = alanine.shaken(3, 0.01)
    energy, forces = evaluate(context_of(system), positions.reshape(-1, 3))
    expected = morse.energy_and_forces(torch.as_tensor(positions))
    assert energy == pytest.approx(expected.energy.sum().item(), rel=1e-10)
    np.testing.assert_allclose(forces, expected.forces.reshape(-1, 3).numpy(), rtol=1e-9, atol=1e-7)


def test_ase(file, morse, alanine):
    calculator = PotentialCalculator(file)
    assert isinstance(calculator.evaluator.evaluated, CompiledPotential)
    for positions in alanine.shaken(5, 0.01):
        atoms = ase.Atoms(alanine.particles.atomic_numbers, positions * units.nm)
        expected = morse.energy_and_forces(torch.as_tensor(positions[None]))
        for one in (calculator, copy.deepcopy(calculator)):
            atoms.calc = one
            unit_of_energy = units.kJ / units.mol
            assert atoms.get_potential_energy() == pytest.approx(expected.energy.item() * unit_of_energy, rel=1e-10)
            found = atoms.get_forces() / (unit_of_energy / units.nm)
            np.testing.assert_allclose(found, expected.forces[0].numpy(), rtol=1e-9, atol=1e-6)


def test_an_object_is_frozen_only_when_asked_for(file, morse, alanine):
    """What the caller may still train stays interpreted, unless compiled code is asked for by name."""
    positions = alanine.shaken(1, 0.01)[0]
    followed, frozen = particle_system(morse), particle_system(morse)
    with pytest.warns(UserWarning, match="no model file"):
        add_potential(followed, morse)
    with pytest.warns(UserWarning, match="no model file"):
        add_potential(frozen, morse, compilation="always")
    before, _ = evaluate(context_of(followed), positions)
    assert evaluate(context_of(frozen), positions)[0] == pytest.approx(before, rel=1e-10)
    with torch.no_grad():
        morse.spring_constants.mul_(2.0)
    assert evaluate(context_of(frozen), positions)[0] == pytest.approx(before, rel=1e-10)
    assert evaluate(context_of(followed), positions)[0] != pytest.approx(before)


def test_a_program_for_many_is_not_given_one(file, morse, alanine):
    """A compiled potential of another batch size, handed over as an object, still gives the right numbers."""
    several = Evaluator.of(file, EvaluationOptions(3)).evaluated
    assert isinstance(several, CompiledPotential)
    positions = alanine.shaken(1, 0.01)[0]
    expected = morse.energy_and_forces(torch.as_tensor(positions[None])).energy.item()
    atoms = ase.Atoms(alanine.particles.atomic_numbers, positions * units.nm, calculator=PotentialCalculator(several))
    assert atoms.get_potential_energy() == pytest.approx(expected * (units.kJ / units.mol), rel=1e-10)
    system = particle_system(several)
    with pytest.warns(UserWarning, match="no model file"):
        add_potential(system, several)
    assert evaluate(context_of(system), positions)[0] == pytest.approx(expected, rel=1e-10)
