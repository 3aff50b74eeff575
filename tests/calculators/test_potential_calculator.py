"""Potentials as ASE calculators, driven by ASE's own dynamics, optimisers and finite differences."""

import copy
import pickle

import ase
import numpy as np
import openmm
import pytest
import torch
from ase import units
from ase.calculators.calculator import CalculatorSetupError, InputError, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.test import gradient_test
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ModelFileError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.model_files.files import save
from flowbridge.core.potential import EnergyAndForces, Potential, PotentialMetadata
from flowbridge.integrations.openmm import add_potential, particle_system

EV = units.kJ / units.mol


def atoms_of(molecule, positions=None, **keywords):
    positions = molecule.positions if positions is None else positions
    return ase.Atoms(molecule.particles.atomic_numbers, positions * units.nm, **keywords)


class Counting(Potential):
    """Another potential, with its evaluations counted."""

    def __init__(self, potential):
        super().__init__()
        self.inner, self.metadata, self.calls = potential, potential.metadata, 0

    def forward(self, positions, cell=None, **global_parameters):
        return self.inner(positions, cell, **global_parameters)

    def energy_and_forces(self, positions, cell=None, **global_parameters):
        self.calls += 1
        return super().energy_and_forces(positions, cell, **global_parameters)


def test_results_are_the_potentials_in_ase_units_and_types(morse, morse_file, alanine):
    positions = alanine.shaken(1)[0]
    atoms = atoms_of(alanine, positions)
    atoms.calc = PotentialCalculator(morse_file)
    energy, forces = morse.energy_and_forces(torch.tensor(positions)[None])
    assert type(atoms.get_potential_energy()) is float
    assert atoms.get_potential_energy() == pytest.approx(float(energy) * EV, rel=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_forces().dtype == np.float64
    np.testing.assert_allclose(atoms.get_forces(), forces[0].numpy() * EV / units.nm, rtol=1e-9, atol=1e-9)
    assert atoms.get_properties(["energy", "forces", "free_energy"])["forces"].shape == (22, 3)
    with pytest.raises(PropertyNotImplementedError, match="stress needs a periodic potential"):
        atoms.get_stress()
    assert "stress" not in atoms.calc.implemented_properties


def test_forces_are_minus_the_gradient_by_ases_own_finite_differences(morse_file, alanine):
    for positions in alanine.shaken(3):
        atoms = atoms_of(alanine, positions)
        atoms.calc = PotentialCalculator(morse_file)
        numerical = calculate_numerical_forces(atoms, eps=1e-5, force_consistent=True)
        np.testing.assert_allclose(atoms.get_forces(), numerical, rtol=1e-5, atol=1e-6)
    analytical, numerical = gradient_test(atoms, indices=[0, 8])
    np.testing.assert_allclose(analytical, numerical, rtol=1e-4, atol=1e-5)


def test_stress_of_a_periodic_potential(fluid):
    random = np.random.default_rng(2)
    cell = np.array([[15.0, 0, 0], [2.0, 14.0, 0], [-3.0, 1.0, 16.0]])
    atoms = ase.Atoms("Ar12", random.random((12, 3)) @ cell, cell=cell, pbc=True)
    atoms.calc = PotentialCalculator(fluid)
    assert "stress" in atoms.calc.implemented_properties
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    assert np.abs(numerical).max() > 1e-6
    np.testing.assert_allclose(atoms.get_stress(), numerical, rtol=1e-6, atol=1e-11)
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), rtol=1e-4, atol=1e-9)
    before = atoms.get_potential_energy()
    atoms.positions += cell[1] - 2 * cell[0]
    assert atoms.get_potential_energy() == pytest.approx(before, rel=1e-12)
    for broken in ({"pbc": [True, True, False]}, {"cell": None}):
        other = atoms.copy()
        other.calc = atoms.calc
        other.set_pbc(broken.get("pbc", True))
        if "cell" in broken:
            other.set_cell(np.zeros((3, 3)))
        with pytest.raises(InputError, match=r"set atoms\.cell and atoms\.pbc = True"):
            other.get_potential_energy()


def test_one_evaluation_a_configuration(morse, alanine):
    potential = Counting(morse)
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    atoms.calc = calculator = PotentialCalculator(potential)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.get_potential_energy(force_consistent=True), atoms.get_forces(), atoms.get_momenta()
    atoms.info["temperature"] = 3.0
    atoms.set_momenta(np.ones((22, 3)))
    assert atoms.get_potential_energy() == energy
    assert potential.calls == 1
    assert not calculator.calculation_required(atoms, ["energy", "forces"])

    forces[:] = 0.0  # what a user does to the array is not seen by the next one
    assert np.abs(atoms.get_forces()).max() > 0.1
    atoms.positions[0, 0] += 1e-13
    assert calculator.calculation_required(atoms, ["energy"])
    assert calculator.check_state(atoms) == ["positions"]
    assert calculator.get_property("energy", atoms, allow_calculation=False) is None
    atoms.get_forces()
    assert potential.calls == 2
    atoms.set_cell([30.0, 30.0, 30.0])
    assert calculator.check_state(atoms) == ["cell"]
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-9)
    assert potential.calls == 3
    atoms.set_pbc([True, False, False])
    assert calculator.check_state(atoms) == ["pbc"]
    with pytest.raises(InputError, match=r"set atoms\.pbc = False"):
        atoms.get_potential_energy()
    atoms.set_pbc(False)
    atoms.get_potential_energy()
    atoms.numbers[3] = 9
    assert calculator.check_state(atoms) == ["numbers"]
    with pytest.raises(InputError, match="atom 3 is F"):
        atoms.get_potential_energy()
    with pytest.raises(InputError, match="atom 3 is F"):  # a refusal is not remembered as a result
        atoms.get_forces()


def test_one_calculator_for_several_atoms(morse, alanine):
    calculator = PotentialCalculator(morse)
    for positions in alanine.shaken(3):
        one, two = atoms_of(alanine, positions), atoms_of(alanine, positions + 0.5)
        one.calc = two.calc = calculator
        two.rotate(90, "x")
        assert one.get_potential_energy() == pytest.approx(two.get_potential_energy(), rel=1e-9)
    last = calculator.atoms
    np.testing.assert_array_equal(last.positions, two.positions)
    last.positions[:] = 0.0
    np.testing.assert_array_equal(calculator.atoms.positions, two.positions)
    assert calculator.get_potential_energy() == two.get_potential_energy()
    calculator.reset()
    assert calculator.atoms is None
    with pytest.raises(InputError, match="no Atoms were calculated yet"):
        calculator.get_potential_energy()


def test_global_parameters(morse, alanine):
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    atoms.calc = PotentialCalculator(morse)
    soft = atoms.get_potential_energy()
    atoms.calc.set_global_parameters(stiffness=3.0)
    stiff = atoms.get_potential_energy()
    assert stiff > soft
    atoms.calc = PotentialCalculator(morse, global_parameters={"stiffness": 3.0})
    assert atoms.get_potential_energy() == stiff
    with pytest.raises(CalculatorSetupError, match="no global parameter 'stifness'; it has stiffness"):
        atoms.calc.set_global_parameters(stifness=2.0)
    with pytest.raises(CalculatorSetupError, match="finite"):
        atoms.calc.set_global_parameters(stiffness=np.nan)


def test_optimiser_finds_the_minimum(morse_file, alanine):
    atoms = atoms_of(alanine, alanine.shaken(1, amplitude=0.01)[0])
    atoms.calc = PotentialCalculator(morse_file)
    start = atoms.get_potential_energy()
    assert BFGS(atoms, logfile=None).run(fmax=1e-4, steps=400)
    assert start > 0.5
    assert atoms.get_potential_energy() < 1e-5


def test_vibrations_have_the_frequencies_of_the_hessian(morse_file, alanine, tmp_path):
    atoms = atoms_of(alanine)
    atoms.calc = PotentialCalculator(morse_file)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vibrations"), delta=0.001)
    vibrations.run()
    energies = vibrations.get_energies()
    hessian = torch.autograd.functional.hessian(
        lambda x: atoms.calc.potential(x.reshape(1, 22, 3))[0], torch.tensor(alanine.positions).reshape(-1)
    )
    root = np.repeat(alanine.particles.masses, 3) ** -0.5
    # kJ/mol/nm^2/amu is 1/ps^2; the quantum of an angular frequency is hbar times it.
    squares = np.linalg.eigvalsh(hessian.numpy() * np.outer(root, root))
    reference = np.sqrt(np.abs(squares)) * units._hbar * 1e12 / units._e
    assert np.abs(energies[:6]).max() < 1e-3
    np.testing.assert_allclose(np.sort(energies.real)[-54:], np.sort(reference)[-54:], rtol=2e-3)


def test_constant_energy_dynamics(morse_file, alanine):
    atoms = atoms_of(alanine)
    atoms.calc = PotentialCalculator(morse_file)
    fluctuations = []
    for step in (0.8, 0.4):
        atoms.positions = alanine.positions * units.nm
        thermalize_momenta(atoms, temperature_K=300.0, rng=np.random.RandomState(4))
        totals = []
        dynamics = VelocityVerlet(atoms, step * units.fs)
        dynamics.attach(lambda: totals.append(atoms.get_total_energy()), interval=2)  # noqa: B023
        dynamics.run(int(600 / step))
        fluctuations.append(np.std(totals))
    assert fluctuations[1] < 0.01
    assert 2.5 < fluctuations[0] / fluctuations[1] < 6.0


def test_langevin_dynamics_heats_the_molecule(morse, alanine):
    potential = Counting(morse)
    atoms = atoms_of(alanine)
    atoms.calc = PotentialCalculator(potential)
    random = np.random.RandomState(11)
    thermalize_momenta(atoms, temperature_K=300.0, rng=random)
    kinetic = []
    friction = 0.05 / units.fs
    # Without fixcm, which by ASE's own warning samples small molecules wrongly (here 340 K).
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=friction, rng=random, fixcm=False)
    dynamics.attach(lambda: kinetic.append(atoms.get_temperature()), interval=5)
    dynamics.run(3000)
    assert np.mean(kinetic[100:]) == pytest.approx(300.0, abs=30.0)
    assert potential.calls <= 3001


def test_same_forces_as_in_openmm(morse_file, alanine):
    system = particle_system(morse_file)
    add_potential(system, morse_file)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    atoms = atoms_of(alanine)
    atoms.calc = PotentialCalculator(morse_file)
    for positions in alanine.shaken(20, amplitude=0.01):
        context.setPositions(positions)
        state = context.getState(getForces=True, getEnergy=True)
        forces = np.array(state.getForces(asNumpy=True)._value)
        atoms.positions = positions * units.nm
        difference = np.linalg.norm(atoms.get_forces() * units.nm / EV - forces) / np.linalg.norm(forces)
        assert difference <= 1e-6
        assert atoms.get_potential_energy() / EV == pytest.approx(state.getPotentialEnergy()._value, rel=1e-9)


def test_pickle_and_deepcopy(morse, morse_file, alanine):
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    atoms.calc = PotentialCalculator(morse_file, global_parameters={"stiffness": 2.0}, dtype="float64")
    energy = atoms.get_potential_energy()
    pickled = pickle.dumps(atoms.calc)
    assert len(pickled) < 2000
    for calculator in (pickle.loads(pickled), copy.deepcopy(atoms.calc)):  # noqa: S301
        assert calculator.results == {}
        assert calculator.get_potential_energy(atoms) == energy

    unsaved = PotentialCalculator(morse, global_parameters={"stiffness": 2.0})
    duplicate = copy.deepcopy(unsaved)
    with torch.no_grad():
        morse.bond_lengths.mul_(1.1)
    assert duplicate.get_potential_energy(atoms) == energy
    assert unsaved.get_potential_energy(atoms) != energy

    save(morse, morse_file)
    with pytest.raises(ModelFileError, match="digest"):
        pickle.loads(pickled)  # noqa: S301


def test_potential_trained_on_after_saving_is_pickled_as_it_is(morse, alanine, tmp_path):
    save(morse, tmp_path / "first.flow")
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    calculator = PotentialCalculator(morse)
    with torch.no_grad():
        morse.bond_lengths.mul_(1.1)
    assert copy.deepcopy(calculator).get_potential_energy(atoms) == calculator.get_potential_energy(atoms)


def test_float32_leaves_the_users_potential_alone(morse, alanine):
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    atoms.calc = PotentialCalculator(morse, dtype=torch.float32)
    exact = PotentialCalculator(morse).get_potential_energy(atoms)
    assert morse.bond_lengths.dtype == torch.float64
    assert type(atoms.get_potential_energy()) is float
    assert atoms.get_forces().dtype == np.float64
    assert 0 < abs(atoms.get_potential_energy() - exact) < 1e-4 * exact


def test_ase_writes_and_reads_the_results(morse_file, alanine, tmp_path):
    atoms = atoms_of(alanine, alanine.shaken(1)[0])
    atoms.calc = PotentialCalculator(morse_file)
    atoms.get_forces()
    for name in ("frames.traj", "frames.xyz"):
        atoms.write(tmp_path / name)
        read = ase.io.read(tmp_path / name)
        assert read.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-7)
        np.testing.assert_allclose(read.get_forces(), atoms.get_forces(), atol=1e-6)
    with Trajectory(tmp_path / "run.traj", "w", atoms) as trajectory:
        trajectory.write()
    assert atoms.calc.name == "flowbridge-test_morse_molecule"
    assert atoms.calc.todict()["model_file"] == str(morse_file)


@pytest.mark.parametrize("seed", range(30))
def test_hostile_atoms_are_refused_and_do_no_harm(morse, alanine, seed):
    """Whatever is wrong with the Atoms has an error that says so, and the calculator works afterwards."""
    random = np.random.default_rng(seed)
    calculator = PotentialCalculator(morse)
    sound = atoms_of(alanine, alanine.shaken(1)[0])
    energy = calculator.get_potential_energy(sound) if seed % 2 else None
    atoms = sound.copy()
    kind = seed % 5
    if kind == 0:
        atoms = atoms[: random.integers(0, 22)]
    elif kind == 1:
        atoms += ase.Atoms("H", [[9.0, 9.0, 9.0]])
    elif kind == 2:
        index = random.integers(22)
        atoms.numbers[index] = (atoms.numbers[index] + random.integers(1, 90)) % 118
    elif kind == 3:
        atoms.positions[random.integers(22), random.integers(3)] = random.choice([np.nan, np.inf, -np.inf])
    else:
        atoms = atoms[np.roll(np.arange(22), random.integers(1, 21))]
    expected = {3: NonFiniteEnergyError}.get(kind, MoleculeMismatchError)
    message = {0: "was made for 22 atoms", 1: "have 23", 2: "where the potential has", 3: "NaN or infinite"}
    for name in ("energy", "forces"):
        with pytest.raises(expected, match=message.get(kind, "another order of its atoms")):
            calculator.get_property(name, atoms)
    again = calculator.get_potential_energy(sound)
    assert np.isfinite(again)
    assert energy is None or again == energy


class Broken(Potential):
    """Gives NaN where it is told to."""

    def __init__(self, particles, energy, force):
        super().__init__()
        self.metadata, self.energy, self.force = PotentialMetadata(particles), energy, force

    def energy_and_forces(self, positions, cell=None):
        forces = torch.zeros_like(positions)
        forces[0, 8, 0] = self.force
        return EnergyAndForces(torch.tensor([self.energy], dtype=torch.float64), forces)


def test_results_that_are_not_finite_are_errors(alanine):
    atoms = atoms_of(alanine)
    atoms.calc = PotentialCalculator(Broken(alanine.particles, float("nan"), 0.0))
    with pytest.raises(NonFiniteEnergyError, match="Broken gives an energy of nan eV"):
        atoms.get_potential_energy()
    atoms.calc = PotentialCalculator(Broken(alanine.particles, 0.0, float("inf")))
    with pytest.raises(NonFiniteEnergyError, match=r"forces on 1 of 22 atoms, first CA \(atom 8 of ALA 2\)"):
        atoms.get_potential_energy()
    assert atoms.calc.results == {}


def test_unusable_setups(morse_file, tmp_path):
    with pytest.raises(CalculatorSetupError, match="path of a model file, not a int"):
        PotentialCalculator(7)
    with pytest.raises(CalculatorSetupError, match="dtype must be"):
        PotentialCalculator(morse_file, dtype="float16")
    with pytest.raises(ModelFileError, match="no such model file"):
        PotentialCalculator(tmp_path / "absent.flow")
