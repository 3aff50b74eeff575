"""Batched energies of a System."""

import importlib
import pickle
import subprocess
import sys
import threading

import ase
import ase.units
import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmm_contexts import context_of, evaluate

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError, WorkerError
from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
from flowbridge.integrations.openmm.energies.plans import EvaluationPlan
from flowbridge.integrations.openmm.energies.system_potential import SystemPotential


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))


@pytest.fixture(scope="module", params=[("amber96.xml", "amber96_obc.xml"), ("amber96.xml", "implicit/obc1.xml")])
def system(alanine, request):
    return app.ForceField(*request.param).createSystem(alanine.topology)


def one_by_one(system, positions):
    context = context_of(system)
    return map(np.array, zip(*(evaluate(context, frame) for frame in positions), strict=True))


@pytest.mark.parametrize(("platform", "tolerance"), [("Reference", 1e-12), ("CPU", 1e-5), (None, 1e-5)])
@pytest.mark.parametrize(("workers", "kind"), [(1, None), (3, "threads"), (2, "processes"), (None, None)])
def test_same_as_one_by_one(system, alanine, platform, tolerance, workers, kind):
    positions = alanine.shaken(300, 0.01)
    energies, forces, failures = OpenMMEnergy(system, platform, workers, kind).evaluate(positions)
    expected, expected_forces = one_by_one(system, positions)
    np.testing.assert_allclose(energies, expected, rtol=tolerance)
    np.testing.assert_allclose(forces, expected_forces, rtol=0, atol=tolerance * np.abs(expected_forces).max())
    assert failures == {}


@pytest.mark.parametrize("kind", [None, "threads", "processes"])
def test_what_cannot_be_evaluated_is_not_a_number(system, alanine, kind):
    positions = alanine.shaken(60, 0.01)
    positions[3, 4, 1], positions[17, 0, 0] = np.nan, np.inf
    positions[55, 7] = positions[55, 8]
    energies, forces, failures = OpenMMEnergy(system, "Reference", 1 if kind is None else 2, kind).evaluate(positions)
    bad = np.isnan(energies)
    assert np.flatnonzero(bad).tolist() == [3, 17, 55]
    assert np.isnan(forces[bad]).all()
    assert np.isfinite(forces[~bad]).all()
    assert list(failures) == [3, 17, 55]
    assert failures[3] == "the position of particle 4 is nan"
    assert failures[17] == "the position of particle 0 is inf"
    assert "overlap" in failures[55] or "the force on particle" in failures[55]


@pytest.mark.parametrize("kind", [None, "threads", "processes"])
def test_energies_without_forces_are_the_same(system, alanine, kind, monkeypatch):
    positions = alanine.shaken(60, 0.01)
    positions[3, 4, 1] = np.nan
    energy = OpenMMEnergy(system, "Reference", 1 if kind is None else 2, kind)
    energies, _ = energy.energies_and_forces(positions)
    assert np.flatnonzero(np.isnan(energies)).tolist() == [3]
    np.testing.assert_allclose(energy.energies(positions), energies, rtol=1e-13)
    if kind is None:
        monkeypatch.setattr(openmm.State, "_getVectorAsNumpy", None)  # forces would be read by it
        np.testing.assert_allclose(energy.energies(positions), energies, rtol=1e-13)
    with pytest.raises(ConfigurationError, match=r"expected \(configurations, 22, 3\)"):
        energy.energies(positions[:, 1:])


def test_nothing_usable_in_the_first_call(system, alanine):
    energy = OpenMMEnergy(system)
    energies, _ = energy.energies_and_forces(np.full((4, 22, 3), np.nan))
    assert np.isnan(energies).all()
    assert energy.energies_and_forces(alanine.shaken(0))[0].shape == (0,)


def test_the_plan_is_remembered(system, alanine, monkeypatch):
    monkeypatch.setattr("flowbridge.integrations.openmm.energies.batched._PATIENCE", 0.0)
    first = OpenMMEnergy(system)
    assert first.plan is None
    first.energies_and_forces(alanine.shaken(20))
    assert isinstance(first.plan, EvaluationPlan)

    def tried(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr("flowbridge.integrations.openmm.energies.batched.fastest_plan", tried)
    again = OpenMMEnergy(system)
    again.energies_and_forces(alanine.shaken(20))
    assert again.plan == first.plan
    other = app.ForceField("amber96.xml").createSystem(alanine.topology)
    with pytest.raises(AssertionError, match="tried again"):
        OpenMMEnergy(other).energies_and_forces(alanine.shaken(20))


def test_nothing_is_tried_for_little_work(system, alanine):
    energy = OpenMMEnergy(system)
    energy.energies_and_forces(alanine.shaken(20))
    assert energy.plan is None
    energy.settle(alanine.shaken(20))
    assert energy.plan is not None


def test_a_cache_that_cannot_be_written_to(system, alanine, monkeypatch, tmp_path):
    monkeypatch.setattr("flowbridge.integrations.openmm.energies.batched._PATIENCE", 0.0)
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path / "file"))
    assert np.isfinite(OpenMMEnergy(system).energies_and_forces(alanine.shaken(20))[0]).all()


def test_bad_arguments(system, alanine):
    with pytest.raises(ConfigurationError, match=r"\(2, 21, 3\), expected \(configurations, 22, 3\)"):
        OpenMMEnergy(system).energies_and_forces(alanine.shaken(2)[:, :21])
    with pytest.raises(ConfigurationError, match="workers must be at least 1, got 0"):
        OpenMMEnergy(system, workers=0)
    with pytest.raises(ConfigurationError, match="'threads', 'processes' or None, got 'fibres'"):
        OpenMMEnergy(system, kind="fibres")
    with pytest.raises(ConfigurationError, match="no OpenMM platform 'Quantum' here: there are Reference, "):
        OpenMMEnergy(system, platform="Quantum")
    with pytest.raises(ConfigurationError, match="not periodic"):
        OpenMMEnergy(system).evaluate(alanine.shaken(2), np.eye(3))


@pytest.fixture(scope="module")
def water():
    """A box of 216 waters (PME), and frames of it in boxes of several sizes."""
    modeller = app.Modeller(app.Topology(), [])
    field = app.ForceField("tip3p.xml")
    modeller.addSolvent(field, boxSize=openmm.Vec3(2.0, 2.0, 2.0) * unit.nanometer)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * unit.nanometer)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
    scales = np.array([1.0, 1.02, 0.99, 1.05])
    cells = scales[:, None, None] * 2.0 * np.eye(3)
    cells[3, 2, 0] = 0.3
    return system, scales[:, None, None] * positions, cells


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_cells_of_their_own(water, kind):
    system, positions, cells = water
    energy = OpenMMEnergy(system, "CPU", 2, kind)
    frames = np.arange(20) % 4
    energies, forces, failures = energy.evaluate(positions[frames], cells[frames])
    context = context_of(system)
    for k in range(4):
        context.setPeriodicBoxVectors(*cells[k])
        expected, expected_forces = evaluate(context, positions[k])
        np.testing.assert_allclose(energies[k::4], expected, rtol=1e-4)
        repeated = np.broadcast_to(expected_forces, (5, *expected_forces.shape))
        np.testing.assert_allclose(forces[k::4], repeated, rtol=1e-4, atol=5.0)
    assert failures == {}
    # Without cells it is the System's own again, not the last one.
    np.testing.assert_allclose(energy.evaluate(positions[[0] * 20]).energies, energies[0], rtol=1e-4)
    np.testing.assert_allclose(energy.evaluate(positions[[1] * 20], cells[1]).energies, energies[1], rtol=1e-4)


def test_cells_that_cannot_be(water):
    system, positions, cells = water
    cells = cells[[0, 0, 0]].copy()
    cells[0, 0, 1] = 0.2  # not in reduced form
    cells[1] *= 0.5  # smaller than twice the cutoff
    energies, _, failures = OpenMMEnergy(system, "CPU", 1).evaluate(positions[[0, 0, 0]], cells)
    assert np.isfinite(energies).tolist() == [False, False, True]
    assert "box" in failures[0]
    assert "cutoff" in failures[1]
    with pytest.raises(ConfigurationError, match=r"cell has shape \(2, 3, 3\), expected \(3, 3\) or \(3, 3, 3\)"):
        OpenMMEnergy(system, "CPU", 1).evaluate(positions[[0, 0, 0]], cells[:2])


DEADLY = """
import os
import signal
import numpy as np
from openmm import unit

def compute(state):
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    first = positions[0, 0]
    print("a force that talks")
    if first == 7.0:
        os.kill(os.getpid(), signal.SIGKILL)
    if first == 8.0:
        raise ValueError("an eight")
    return 2.0 * first, np.zeros_like(positions)
"""


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """A System whose energy is 2 x of its first particle; it kills its process at x = 7 and raises at x = 8."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(importlib.import_module("deadly").compute))
    return system


def test_a_worker_that_dies_takes_one_configuration_with_it(deadly):
    positions = np.zeros((200, 3, 3))
    positions[:, 0, 0] = 0.01 * np.arange(200)
    positions[[20, 150], 0, 0], positions[[21, 199], 0, 0] = 7.0, 8.0
    energy = OpenMMEnergy(deadly, "Reference", 2, "processes")
    energies, _, failures = energy.evaluate(positions)
    assert sorted(failures) == np.flatnonzero(np.isnan(energies)).tolist() == [20, 21, 150, 199]
    usable = np.isfinite(energies)
    np.testing.assert_array_equal(energies[usable], 2.0 * positions[usable, 0, 0])
    assert failures[150] == "the process that evaluated it was ended by signal SIGKILL, twice"
    assert "an eight" in failures[21]
    # and the next call is as good as new
    assert np.isfinite(energy.evaluate(positions[:20]).energies).all()


def test_workers_that_are_ended_from_outside_lose_nothing(deadly):
    positions = np.zeros((200, 3, 3))
    energy = OpenMMEnergy(deadly, "Reference", 2, "processes")

    def kill_one(done, total):
        if done > 20 and not killed:
            killed.append(energy._pool._processes[0].process)
            killed[0].kill()

    killed = []
    energies, _, failures = energy.evaluate(positions, progress=kill_one)
    assert killed
    assert failures == {}
    np.testing.assert_array_equal(energies, 0.0)
    for process in energy._pool._processes:
        process.process.kill()
    assert energy.evaluate(positions).failures == {}


def test_too_many_deaths_end_the_call_and_not_the_results(deadly):
    positions = np.zeros((60, 3, 3))
    positions[10:, 0, 0] = 7.0
    energies, _, failures = OpenMMEnergy(deadly, "Reference", 2, "processes").evaluate(positions)
    assert sorted(failures) == list(range(10, 60))
    assert (energies[:10] == 0.0).all()
    assert any("worker processes had died before" in reason for reason in failures.values())


def test_a_system_that_workers_cannot_make(deadly, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(WorkerError, match="use kind='threads'"):
        OpenMMEnergy(deadly, "Reference", 2, "processes").evaluate(np.zeros((40, 3, 3)))


@pytest.mark.parametrize(("workers", "kind"), [(1, None), (2, "threads"), (2, "processes")])
def test_stopping(system, alanine, workers, kind):
    positions = alanine.shaken(3000, 0.01)
    energy = OpenMMEnergy(system, "CPU", workers, kind)
    stop = threading.Event()
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done > 50:
            stop.set()

    energies, forces, failures = energy.evaluate(positions, progress=progress, stop=stop)
    finished = np.isfinite(energies)
    assert 50 < finished.sum() == seen[-1][0] < 3000
    assert all(total == 3000 for _, total in seen)
    assert sorted(failures) == np.flatnonzero(~finished).tolist()
    assert set(failures.values()) == {"not evaluated: the evaluation was stopped before"}

    class Interrupted(BaseException):
        pass

    def interrupt(done, total):
        raise Interrupted

    with pytest.raises(Interrupted):
        energy.evaluate(positions, progress=interrupt)
    again = energy.evaluate(positions[finished][:100])
    np.testing.assert_allclose(again.energies, energies[finished][:100], rtol=1e-6)
    np.testing.assert_allclose(again.forces, forces[finished][:100], rtol=0, atol=1e-2)


def test_a_script_needs_no_guard(system, tmp_path):
    """Worker processes do not import the script that started them, and Ctrl-C is left to it."""
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, openmm\n"
        "from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy\n"
        "print('once')\n"
        "system = openmm.XmlSerializer.deserialize(open('system.xml').read())\n"
        "energy = OpenMMEnergy(system, 'Reference', 2, 'processes')\n"
        "values = energy.evaluate(np.random.default_rng(1).normal(size=(100, 22, 3)))\n"
        "print(np.isfinite(values.energies).sum())\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["once", "100"]


def test_copies(system, alanine):
    energy = OpenMMEnergy(system, "Reference", 2, "threads")
    positions = alanine.shaken(20)
    copied = pickle.loads(pickle.dumps(energy))  # noqa: S301
    np.testing.assert_array_equal(copied.evaluate(positions).energies, energy.evaluate(positions).energies)
    assert copied.plan == energy.plan


class TestSystemPotential:
    def test_gradients_are_the_forces(self, system, alanine):
        potential = SystemPotential(system, alanine.topology, OpenMMEnergy(system, "Reference", 1))
        positions = torch.as_tensor(alanine.shaken(3, 0.01)).requires_grad_(True)
        assert torch.autograd.gradcheck(potential, (positions,), eps=1e-6, rtol=1e-5)
        values = potential.energy_and_forces(positions)
        (gradient,) = torch.autograd.grad((potential(positions) * torch.tensor([1.0, 2.0, -3.0])).sum(), positions)
        expected = -values.forces * torch.tensor([1.0, 2.0, -3.0])[:, None, None]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)

    def test_there_is_no_second_derivative(self, system, alanine):
        potential = SystemPotential(system, alanine.topology)
        positions = torch.as_tensor(alanine.shaken(2)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(potential(positions).sum(), positions, create_graph=True)
        with pytest.raises(RuntimeError, match="not second derivatives"):
            gradient.square().sum().backward()
        # neither is it a silent zero in a sum with something that has one
        with pytest.raises(RuntimeError, match="not second derivatives"):
            (positions.square().sum() + gradient.sum()).backward()

    def test_failures_are_not_a_number(self, system, alanine):
        potential = SystemPotential(system, alanine.topology)
        positions = torch.as_tensor(alanine.shaken(3))
        positions[1, 2, 0] = torch.nan
        positions.requires_grad_(True)
        energy = potential(positions)
        assert torch.isnan(energy).tolist() == [False, True, False]
        energy.sum().backward()
        assert torch.isnan(positions.grad).all((1, 2)).tolist() == [False, True, False]

    def test_a_system_in_ase(self, system, alanine):
        atoms = ase.Atoms(
            numbers=[atom.element.atomic_number for atom in alanine.topology.atoms()],
            positions=10.0 * alanine.positions,
            calculator=PotentialCalculator(SystemPotential(system, alanine.topology)),
        )
        _, forces = evaluate(context_of(system), alanine.positions)
        expected = forces * (ase.units.kJ / ase.units.mol / ase.units.nm)
        np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-10)

    def test_cells(self, water):
        system, positions, cells = water
        potential = SystemPotential(system, water_topology(system), OpenMMEnergy(system, "CPU", 1))
        assert potential.metadata.periodic
        box = torch.as_tensor(cells[:2])
        found = potential(torch.as_tensor(positions[:2]), box)
        expected = OpenMMEnergy(system, "CPU", 1).evaluate(positions[:2], cells[:2]).energies
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
        with pytest.raises(ConfigurationError, match="derivative with respect to the cell"):
            potential(torch.as_tensor(positions[:2]), box.clone().requires_grad_(True))

    def test_another_molecule(self, system):
        with pytest.raises(ConfigurationError, match="topology has 0 atoms and the System 22 particles"):
            SystemPotential(system, app.Topology())


def water_topology(system):
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(system.getNumParticles() // 3):
        residue = topology.addResidue("HOH", chain)
        for name, element in (("O", "O"), ("H1", "H"), ("H2", "H")):
            topology.addAtom(name, app.Element.getBySymbol(element), residue)
    return topology
