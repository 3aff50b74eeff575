"""``flowbridge train`` on trajectories as users have them, and what it refuses."""

import json
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app
from typer.testing import CliRunner

import flowbridge
from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.units import thermal_energy
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, Trajectory, run_langevin
from flowbridge.workflows.boltzmann import from_trajectory
from flowbridge.workflows.boltzmann.averages import missing_conformation
from flowbridge.workflows.boltzmann.trajectory import configurational_temperature
from flowbridge.workflows.machines import Machines

EXAMPLES = Path(__file__).parents[2] / "examples"
STRUCTURE = EXAMPLES / "alanine_dipeptide.pdb"
FORCE_FIELD = ("amber96.xml", "amber96_obc.xml")
TINY = """
[model.flow.stiff]
couplings = 1
hidden = [16]
[model.flow.torsions]
couplings = 1
components = 4
hidden = [16]
[model.training.likelihood]
steps = 60
batch = 128
[model.training.refinement]
steps = 10
batch = 64
[reweight]
bootstrap = 50
"""


@pytest.fixture(scope="module")
def folder(alanine, tmp_path_factory):
    """Topology, System and a DCD of 400 frames, as a simulation leaves them; and a small configuration."""
    folder = tmp_path_factory.mktemp("user")
    system = app.ForceField(*FORCE_FIELD).createSystem(alanine.topology)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    (folder / "tiny.toml").write_text(TINY)
    run = LangevinRun(
        openmm.XmlSerializer.serialize(system), alanine.positions, 300.0, 0.001, 5.0, 2000, 20, 400, 1, folder / "x.npz"
    )
    frames = run_langevin(run)
    trajectory = mdtraj.Trajectory(frames.positions, mdtraj.Topology.from_openmm(alanine.topology))
    trajectory.save(str(folder / "y.dcd"))
    return folder


def options(folder: Path, **changes):
    arguments = {
        "topology": STRUCTURE,
        "trajectories": [folder / "y.dcd"],
        "system": folder / "system.xml",
        "force_field": (),
        "configuration": folder / "tiny.toml",
        "samples": 500,
    }
    return {**arguments, **changes}


def frames_of(folder: Path) -> mdtraj.Trajectory:
    return mdtraj.load(str(folder / "y.dcd"), top=str(STRUCTURE))


@pytest.fixture(scope="module")
def done(folder):
    """The command, run once."""
    arguments = ["train", "--topology", str(STRUCTURE), "--trajectory", str(folder / "y.dcd"), "--system"]
    arguments += [str(folder / "system.xml"), "--config", str(folder / "tiny.toml"), "--samples", "500"]
    arguments += ["--torsion", "phi=ACE:C,ALA:N,ALA:CA,ALA:C", "--output", str(folder / "out")]
    return CliRunner().invoke(application, arguments)


class TestCommand:
    def test_leaves_a_generator_and_averages(self, folder, done):
        assert done.exit_code == 0, done.output
        assert "potential energy" in done.output
        results = json.loads((folder / "out" / "results.json").read_text())
        model = flowbridge.load(folder / "out" / "model.flow")
        assert model.metadata.temperature == 300.0
        samples = WeightedSamples.load(folder / "out" / "samples.h5")
        assert len(samples) == 500
        averages = {one["name"]: one for one in results["averages"]}
        assert set(averages) == {"potential energy (kJ/mol)", "phi gauche+", "phi trans", "phi gauche-"}
        # The plain averages are those of the frames that were not held out.
        phi = np.degrees(mdtraj.compute_phi(frames_of(folder)[:360])[1][:, 0])
        assert averages["phi trans"]["training"] == pytest.approx((np.abs(phi) > 120.0).mean(), abs=1e-3)
        total = sum(averages[f"phi {well}"]["value"] for well in ("gauche+", "trans", "gauche-"))
        assert total == pytest.approx(1.0)

    def test_repeating_it_does_nothing_new(self, folder, done):
        before = (folder / "out" / "results.json").read_text()
        stages = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("results.json")}
        from_trajectory.train_from_trajectory(
            from_trajectory.workflow_from(
                **options(folder, output=folder / "out", torsions=["phi=ACE:C,ALA:N,ALA:CA,ALA:C"])
            )
        )
        assert (folder / "out" / "results.json").read_text() == before
        assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("results.json")} == stages
        assert len(stages) == 4


def read(folder, tmp_path, **changes):
    """Only the stage that reads."""
    from flowbridge.workflows.boltzmann.molecular_system import molecular_system
    from flowbridge.workflows.boltzmann.trajectory import trajectory_stage

    workflow = from_trajectory.workflow_from(**options(folder, output=tmp_path / "out", **changes))
    molecule, machines = molecular_system(workflow, Path()), Machines(ProcessExecutor(workflow.workers))
    stage = trajectory_stage(workflow, workflow.trajectory, molecule, Path(), machines)
    return stage.completed(workflow.output, {})


class TestReading:
    def test_discard_stride_and_held_out(self, folder, tmp_path):
        results = read(folder, tmp_path, discard=100, stride=2).results
        assert (results["training_frames"], results["held_out_frames"]) == (135, 15)

    def test_constrained_trajectory_is_refused_and_relaxed(self, folder, alanine, tmp_path):
        system = app.ForceField(*FORCE_FIELD).createSystem(alanine.topology, constraints=app.HBonds)
        integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.002)
        integrator.setRandomNumberSeed(2)
        simulation = app.Simulation(alanine.topology, system, integrator, openmm.Platform.getPlatform("Reference"))
        simulation.context.setPositions(alanine.positions)
        simulation.step(1000)
        simulation.reporters.append(app.XTCReporter(str(tmp_path / "rigid.xtc"), 10))
        simulation.step(1500)
        with pytest.raises(ConfigurationError, match=r"12 of 21 bonds have a constant length.*relaxation_steps = 500"):
            read(folder, tmp_path, trajectories=[tmp_path / "rigid.xtc"])
        results = read(folder, tmp_path, trajectories=[tmp_path / "rigid.xtc"], relaxation_steps=300).results
        temperature, error = results["configurational_temperature_K"], results["configurational_temperature_error_K"]
        assert abs(temperature - 300.0) < 4 * error
        assert error < 30.0

    @pytest.mark.parametrize("temperature", [200.0, 450.0])
    def test_another_temperature_is_refused(self, folder, tmp_path, temperature):
        with pytest.raises(
            ConfigurationError, match=rf"(28|29|30|31)\d \+- \d+ K in this System, not at {temperature:g} K"
        ):
            read(folder, tmp_path, temperature=temperature)

    def test_a_system_with_constraints_is_refused(self, folder, alanine, tmp_path):
        system = app.ForceField(*FORCE_FIELD).createSystem(alanine.topology, constraints=app.HBonds)
        (tmp_path / "rigid.xml").write_text(openmm.XmlSerializer.serialize(system))
        with pytest.raises(ConfigurationError, match="constraints, but a flow samples every bond"):
            read(folder, tmp_path, system=tmp_path / "rigid.xml")

    def test_frames_of_another_molecule(self, folder, tmp_path):
        frames_of(folder).atom_slice(range(20)).save(str(tmp_path / "few.dcd"))
        with pytest.raises(MoleculeMismatchError, match="22 particles"):
            read(folder, tmp_path, trajectories=[tmp_path / "few.dcd"])

    def test_atoms_in_another_order(self, folder, tmp_path):
        shuffled = frames_of(folder)
        shuffled.xyz = shuffled.xyz[:, np.random.default_rng(1).permutation(22)]
        shuffled.save(str(tmp_path / "shuffled.dcd"))
        with pytest.raises((MoleculeMismatchError, ConfigurationError, NonFiniteEnergyError)):
            read(folder, tmp_path, trajectories=[tmp_path / "shuffled.dcd"])

    def test_too_short(self, folder, tmp_path):
        with pytest.raises(ConfigurationError, match="give longer trajectories"):
            read(folder, tmp_path, discard=399)


class TestOptions:
    @pytest.mark.parametrize("text", ["phi", "phi=1,2,3", "=1,2,3,4", "phi=1,2,,4"])
    def test_torsions(self, folder, text):
        with pytest.raises(ConfigurationError, match="a torsion is NAME=A,B,C,D"):
            from_trajectory.workflow_from(**options(folder, torsions=[text]))

    def test_configuration_with_misspelt_keys(self, folder, tmp_path):
        (tmp_path / "bad.toml").write_text("[model.flow]\ncirculars = 1\n")
        with pytest.raises(ConfigurationError, match="circulars"):
            from_trajectory.workflow_from(**options(folder, configuration=tmp_path / "bad.toml"))

    def test_neither_system_nor_force_field(self, folder):
        arguments = ["train", "--topology", str(STRUCTURE), "--trajectory", str(folder / "y.dcd")]
        done = CliRunner().invoke(application, [*arguments, "--output", str(folder / "none")])
        assert done.exit_code == 1
        assert "exactly one of force_field" in done.output

    def test_the_example_is_valid(self):
        from flowbridge.workflows.boltzmann.configuration import read_workflow

        workflow = read_workflow(EXAMPLES / "reweight_trajectory.toml")
        assert workflow.trajectory is not None
        assert workflow.molecule.torsions


class TestConfigurationalTemperature:
    def test_of_an_oscillator(self):
        """Harmonic particles: exact samples give the temperature with an error that covers it."""
        stiffness = np.random.default_rng(0).uniform(1e3, 3e5, (4, 3))

        class Springs:
            def energies_and_forces(self, positions):
                return 0.5 * (stiffness * positions**2).sum((1, 2)), -stiffness * positions

        deviations = []
        for seed in range(40):
            random = np.random.default_rng(seed)
            positions = random.standard_normal((300, 4, 3)) * np.sqrt(thermal_energy(350.0) / stiffness)
            frames = Trajectory(positions, *Springs().energies_and_forces(positions))
            found = configurational_temperature(frames, Springs(), seed)
            deviations.append((found.value - 350.0) / found.error)
            assert found.error < 20.0
        assert abs(np.mean(deviations)) < 0.5
        assert 0.7 < np.std(deviations) < 1.4


def test_one_heavy_sample_is_pointed_at(alanine):
    random = np.random.default_rng(1)
    weights = random.normal(0.0, 0.1, 1000)
    weights[17] = 5.0
    samples = WeightedSamples(alanine.shaken(1000), weights, alanine.particles, 300.0)
    shown = missing_conformation([samples], {"omega": (4, 6, 8, 14)})
    assert "times the mean weight" in shown
    assert "omega" in shown
    assert missing_conformation([samples.subset(slice(0, 10))], {}) is None
