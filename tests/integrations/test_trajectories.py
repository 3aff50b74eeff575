"""Samples from files that simulations wrote, and in files that other tools read."""

import shutil

import ase
import ase.io
import mdtraj
import numpy as np
import openmm
import pytest
from ase.calculators.lj import LennardJones
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.units import fs, kJ, mol, nm
from mdtraj.reporters import HDF5Reporter
from openmm import app, unit

from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError
from flowbridge.core.sample_files import SampleFileError
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.units import thermal_energy
from flowbridge.integrations.mdtraj.trajectories import samples_from_trajectory, write_trajectory

TEMPERATURE = 300.0


@pytest.fixture
def samples(alanine) -> WeightedSamples:
    random = np.random.default_rng(1)
    energies = {"target": random.normal(10.0, 1.0, 40), "generator": random.normal(8.0, 1.0, 40)}
    log_weights = energies["generator"] - energies["target"]
    return WeightedSamples(alanine.shaken(40), log_weights, alanine.particles, TEMPERATURE, energies, {"seed": 1})


@pytest.fixture
def pdb(alanine, tmp_path):
    file = tmp_path / "alanine.pdb"
    with file.open("w") as stream:
        app.PDBFile.writeFile(alanine.topology, alanine.positions * unit.nanometer, stream)
    return file


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("name", "tolerance"),
        [("x.h5", 0.0), ("x.dcd", 1e-6), ("x.xtc", 6e-4), ("x.nc", 1e-6), ("x.traj", 1e-12), ("x.extxyz", 1e-8)],
    )
    def test_positions_weights_and_potentials(self, samples, tmp_path, name, tolerance):
        write_trajectory(samples, tmp_path / name)
        back = samples_from_trajectory(tmp_path / name, samples.particles, TEMPERATURE)
        assert np.abs(back.positions - samples.positions).max() <= tolerance
        text = 1e-7 if name == "x.extxyz" else 0.0
        assert np.allclose(back.log_weights, samples.log_weights, rtol=0, atol=text)
        assert set(back.reduced_potentials) == {"target", "generator"}
        for key, values in samples.reduced_potentials.items():
            assert np.allclose(back.reduced_potentials[key], values, rtol=0, atol=text)

    def test_several_files_stride_and_discard(self, samples, tmp_path):
        files = [tmp_path / "a.dcd", tmp_path / "b.xtc"]
        for file, part in zip(files, (slice(0, 25), slice(25, 40)), strict=True):
            write_trajectory(samples.subset(part), file)
        back = samples_from_trajectory(files, samples.particles, TEMPERATURE, stride=3, discard=5)
        kept = [*range(5, 25, 3), *range(30, 40, 3)]
        assert np.abs(back.positions - samples.positions[kept]).max() < 1e-3
        assert np.array_equal(back.log_weights, samples.log_weights[kept])


class TestOtherTools:
    def test_mdtraj_with_the_written_topology(self, samples, tmp_path):
        write_trajectory(samples, tmp_path / "x.xtc", topology=tmp_path / "x.pdb")
        trajectory = mdtraj.load(str(tmp_path / "x.xtc"), top=str(tmp_path / "x.pdb"))
        psi = mdtraj.compute_psi(trajectory)[1]
        weights = np.load(tmp_path / "x.xtc.weights.npz")["log_weights"]
        assert psi.shape == (len(weights), 1)

    def test_mdanalysis(self, samples, tmp_path):
        analysis = pytest.importorskip("MDAnalysis", reason="MDAnalysis is not installed: pip install MDAnalysis")
        for name in ("x.dcd", "x.xtc"):
            write_trajectory(samples, tmp_path / name, topology=tmp_path / "x.pdb")
            universe = analysis.Universe(str(tmp_path / "x.pdb"), str(tmp_path / name))
            assert len(universe.trajectory) == len(samples)
            frames = np.stack([step.positions.copy() for step in universe.trajectory]) / 10.0
            assert np.abs(frames - samples.positions).max() < 1e-3

    def test_ase_has_the_energies(self, samples, tmp_path):
        write_trajectory(samples, tmp_path / "x.traj")
        atoms = ase.io.read(tmp_path / "x.traj", index=7)
        expected = samples.reduced_potentials["target"][7] * thermal_energy(TEMPERATURE) * kJ / mol
        assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-12)


class TestSimulations:
    def test_reporters_of_openmm(self, alanine, pdb, tmp_path):
        system = app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(alanine.topology)
        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.001)
        integrator.setRandomNumberSeed(1)
        simulation = app.Simulation(alanine.topology, system, integrator, openmm.Platform.getPlatform("Reference"))
        simulation.context.setPositions(alanine.positions)
        reporters = [
            app.DCDReporter(str(tmp_path / "x.dcd"), 10),
            app.XTCReporter(str(tmp_path / "x.xtc"), 10),
            HDF5Reporter(str(tmp_path / "x.h5"), 10),
        ]
        simulation.reporters += reporters
        simulation.step(100)
        last = simulation.context.getState(positions=True).getPositions(asNumpy=True)._value
        reporters[2].close()
        simulation.reporters.clear()
        del reporters
        for name, tolerance in (("x.dcd", 1e-6), ("x.xtc", 6e-4), ("x.h5", 1e-6)):
            back = samples_from_trajectory(tmp_path / name, pdb, TEMPERATURE)
            assert len(back) == 10
            assert not back.log_weights.any()
            assert np.abs(back.positions[-1] - last).max() < tolerance, name

    def test_dynamics_in_ase(self, tmp_path):
        atoms = ase.Atoms("Ar3", positions=[[0, 0, 0], [3.8, 0, 0], [1.9, 3.3, 0]])
        atoms.calc = LennardJones(epsilon=0.01, sigma=3.4)
        dynamics = VelocityVerlet(atoms, 2 * fs)
        with Trajectory(tmp_path / "x.traj", "w", atoms) as file:
            dynamics.attach(file.write, interval=5)
            dynamics.run(50)
        topology = app.Topology()
        residue = topology.addResidue("AR", topology.addChain())
        for name in ("A", "B", "C"):
            topology.addAtom(name, app.Element.getBySymbol("Ar"), residue)
        back = samples_from_trajectory(tmp_path / "x.traj", topology, TEMPERATURE)
        assert len(back) == 11
        assert np.allclose(back.positions[-1], atoms.positions / nm)
        energies = back.reduced_potentials["trajectory"] * thermal_energy(TEMPERATURE) * kJ / mol
        assert energies[-1] == pytest.approx(atoms.get_potential_energy(), rel=1e-9)


class TestRefused:
    def test_another_molecule(self, samples, pdb, tmp_path):
        few = WeightedSamples(samples.positions[:, :3], samples.log_weights, first(samples.particles, 3), TEMPERATURE)
        for name in ("x.dcd", "x.xtc", "x.h5", "x.traj"):
            write_trajectory(few, tmp_path / name)
            with pytest.raises(MoleculeMismatchError, match=r"22"):
                samples_from_trajectory(tmp_path / name, pdb, TEMPERATURE)

    def test_another_order_of_atoms(self, samples, pdb, tmp_path):
        write_trajectory(samples, tmp_path / "x.traj")
        frames = [atoms[::-1] for atoms in ase.io.read(tmp_path / "x.traj", index=":")]
        ase.io.write(tmp_path / "y.traj", frames)
        with pytest.raises(MoleculeMismatchError, match="order of the atoms"):
            samples_from_trajectory(tmp_path / "y.traj", pdb, TEMPERATURE)

    @pytest.mark.parametrize("frames", [[3, 4], range(40)], ids=["in some frames", "in every frame"])
    def test_a_molecule_cut_by_the_box(self, alanine, pdb, tmp_path, frames):
        positions = alanine.shaken(40)
        positions[np.ix_(list(frames), range(10, 22), [0])] -= 2.0
        mdtraj.Trajectory(positions, mdtraj.Topology.from_openmm(alanine.topology)).save(str(tmp_path / "x.dcd"))
        with pytest.raises(
            MoleculeMismatchError, match=rf"in {len(frames)} of 40 frames .*broken.*make_molecules_whole"
        ):
            samples_from_trajectory(tmp_path / "x.dcd", pdb, TEMPERATURE)

    def test_weights_of_another_trajectory(self, samples, tmp_path):
        write_trajectory(samples, tmp_path / "x.dcd")
        write_trajectory(samples.subset(slice(None, None, -1)), tmp_path / "y.dcd")
        shutil.copy(tmp_path / "y.dcd", tmp_path / "x.dcd")
        with pytest.raises(SampleFileError, match="weights of another trajectory"):
            samples_from_trajectory(tmp_path / "x.dcd", samples.particles, TEMPERATURE)

    def test_another_temperature(self, samples, tmp_path):
        for name in ("x.h5", "x.dcd", "x.traj"):
            write_trajectory(samples, tmp_path / name)
            with pytest.raises(ConfigurationError, match="300 K, not at 310 K"):
                samples_from_trajectory(tmp_path / name, samples.particles, 310.0)

    def test_files_that_are_not_there_or_no_trajectories(self, samples, pdb, tmp_path):
        with pytest.raises(ConfigurationError, match="does not exist"):
            samples_from_trajectory(tmp_path / "x.dcd", pdb, TEMPERATURE)
        for name in ("x.dcd", "x.xtc", "x.h5", "x.traj", "x.what"):
            (tmp_path / name).write_text("nothing of the kind\n")
            with pytest.raises(ConfigurationError, match="cannot be read"):
                samples_from_trajectory(tmp_path / name, pdb, TEMPERATURE)
        with pytest.raises(ConfigurationError, match=r"nothing here writes \.what"):
            write_trajectory(samples, tmp_path / "y.what")
        with pytest.raises(ConfigurationError, match="no topology can be read"):
            samples_from_trajectory(tmp_path / "x.dcd", tmp_path / "x.dcd", TEMPERATURE)

    def test_too_few_frames_and_bad_positions(self, samples, tmp_path):
        write_trajectory(samples, tmp_path / "x.dcd")
        with pytest.raises(ConfigurationError, match="40 frames, of which 40"):
            samples_from_trajectory(tmp_path / "x.dcd", samples.particles, TEMPERATURE, discard=40)
        broken = samples.positions.copy()
        broken[5] = np.nan
        mdtraj.Trajectory(broken, samples.to_mdtraj().topology).save(str(tmp_path / "y.dcd"))
        with pytest.raises(ValueError, match="NaN"):
            samples_from_trajectory(tmp_path / "y.dcd", samples.particles, TEMPERATURE)

    def test_nothing_is_left_of_a_failed_write(self, samples, tmp_path, monkeypatch):
        def fail(self, name, *arguments, **keywords):
            with open(name, "w") as file:
                file.write("half")
            raise OSError("the disk is full")

        monkeypatch.setattr(mdtraj.Trajectory, "save", fail)
        with pytest.raises(OSError, match="disk is full"):
            write_trajectory(samples, tmp_path / "x.dcd")
        assert not list(tmp_path.iterdir())


def first(particles, count):
    """The first particles without their bonds."""
    from dataclasses import replace

    cut = {
        name: getattr(particles, name)[:count]
        for name in ("names", "atomic_numbers", "masses", "residue_names", "residue_indices")
    }
    return replace(particles, bonds=(), **cut)
