"""``flowbridge md``: what it leaves behind, that it goes on where it stopped, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app, unit
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.model_files.files import load, save
from flowbridge.integrations.openmm.sampling import model_dynamics
from flowbridge.integrations.openmm.sampling.model_dynamics import ModelDynamics, run_model_dynamics

STRUCTURE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide.pdb"


@pytest.fixture
def run(shared_morse_file, tmp_path) -> ModelDynamics:
    return ModelDynamics(
        shared_morse_file, STRUCTURE, tmp_path / "out" / "x", 600, frame_interval=5, friction_per_ps=20.0
    )


def table(run: ModelDynamics) -> np.ndarray:
    return np.loadtxt(run.file(".csv"), delimiter=",", skiprows=1, ndmin=2)


class Stopped(Exception):
    pass


def stop_after(frames):
    def announce(progress):
        if progress.step >= 5 * frames:
            raise Stopped

    return announce


class TestFiles:
    def test_trajectory_and_table(self, run):
        end = run_model_dynamics(run)
        frames = mdtraj.load(str(run.file(".dcd")), top=str(STRUCTURE))
        rows = table(run)
        assert len(frames) == len(rows) == 120
        assert rows[:, 0].tolist() == list(range(5, 605, 5))
        assert np.allclose(rows[:, 1], rows[:, 0] * 1e-3)
        energies = load(run.model).energy_and_forces(torch.tensor(frames.xyz.astype(float))).energy.numpy()
        # The frames are rounded to single precision, in Angstrom.
        assert np.allclose(energies, rows[:, 2], atol=0.05)
        assert (end.step, end.done_now, end.potential_energy) == (600, 600, pytest.approx(rows[-1, 2], abs=1e-5))

    def test_the_thermostat_has_the_models_temperature(self, run):
        run_model_dynamics(replace(run, steps=6000, frame_interval=20))
        temperatures = table(run)[50:, 4]
        error = temperatures.std() / np.sqrt(len(temperatures) / 10)
        assert abs(temperatures.mean() - 300.0) < 4 * error
        assert error < 12.0

    def test_constant_energy(self, run):
        run_model_dynamics(replace(run, friction_per_ps=None, step_fs=0.25))
        rows = table(run)
        total = rows[:, 2] + rows[:, 3]
        assert total.std() < 0.05 * rows[:, 3].std()

    def test_a_periodic_model_takes_the_box_of_the_structure(self, fluid, tmp_path):
        topology = app.Topology()
        for _ in range(12):
            topology.addAtom("Ar", app.Element.getBySymbol("Ar"), topology.addResidue("AR", topology.addChain()))
        topology.setUnitCellDimensions((1.5, 1.5, 1.5) * unit.nanometer)
        positions = np.random.default_rng(1).uniform(0.0, 1.5, (12, 3))
        with (tmp_path / "box.pdb").open("w") as stream:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, stream)
        save(fluid, tmp_path / "fluid.flow")
        run = ModelDynamics(tmp_path / "fluid.flow", tmp_path / "box.pdb", tmp_path / "x", 100, temperature=100.0)
        run_model_dynamics(run)
        frames = mdtraj.load(str(run.file(".dcd")), top=str(tmp_path / "box.pdb"))
        assert np.allclose(frames.unitcell_lengths, 1.5)
        with pytest.raises(ConfigurationError, match="names no temperature"):
            run_model_dynamics(replace(run, temperature=None, output=tmp_path / "y"))
        topology.setPeriodicBoxVectors(None)
        with (tmp_path / "nobox.pdb").open("w") as stream:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, stream)
        with pytest.raises(ConfigurationError, match=r"periodic, and .* has no box"):
            run_model_dynamics(replace(run, structure=tmp_path / "nobox.pdb", output=tmp_path / "z"))


class TestContinuing:
    @pytest.mark.parametrize("frames", [10, 50, 73, 119])
    def test_an_interrupted_run_repeats_the_numbers_of_an_undisturbed_one(self, run, tmp_path, frames):
        run_model_dynamics(run)
        other = replace(run, output=tmp_path / "other")
        with pytest.raises(Stopped):
            run_model_dynamics(other, stop_after(frames))
        if frames < 50:  # before the first checkpoint
            with pytest.raises(ConfigurationError, match=r"no checkpoint to continue it from: remove it"):
                run_model_dynamics(other)
            return
        run_model_dynamics(other)
        assert other.file(".csv").read_text() == run.file(".csv").read_text()
        assert frames_of(other) == frames_of(run)

    def test_a_frame_that_was_half_written(self, run, tmp_path):
        run_model_dynamics(run)
        other = replace(run, output=tmp_path / "other")
        with pytest.raises(Stopped):
            run_model_dynamics(other, stop_after(60))
        with other.file(".dcd").open("ab") as stream:
            stream.write(b"half a frame")
        run_model_dynamics(other)
        assert frames_of(other) == frames_of(run)

    def test_more_steps_extend_it(self, run, tmp_path):
        run_model_dynamics(run)
        other = replace(run, output=tmp_path / "other", steps=300)
        assert run_model_dynamics(other).step == 300
        end = run_model_dynamics(replace(other, steps=600))
        assert (end.step, end.done_now) == (600, 300)
        assert frames_of(other) == frames_of(run)
        assert run_model_dynamics(replace(other, steps=600)).done_now == 0

    def test_other_settings_are_another_run(self, run):
        run_model_dynamics(run)
        with pytest.raises(ConfigurationError, match="of a run with other settings"):
            run_model_dynamics(replace(run, temperature=310.0, steps=1200))

    def test_a_trajectory_that_was_cut(self, run):
        run_model_dynamics(run)
        with run.file(".dcd").open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(ConfigurationError, match="shorter than at the checkpoint"):
            run_model_dynamics(replace(run, steps=1200))


class TestRefused:
    def test_dynamics_that_explode(self, run):
        hot = replace(run, step_fs=7.0, friction_per_ps=0.01, frame_interval=1)
        with pytest.raises(
            NonFiniteEnergyError, match=r"stopped between steps \d+ and \d+.*shorten the time step"
        ) as failure:
            run_model_dynamics(hot)
        rows = table(hot)  # what there was before is there
        assert f"between steps {len(rows)} and" in str(failure.value)
        assert f"The {len(rows)} frames before are in" in str(failure.value)
        assert len(rows) >= 1
        assert len(mdtraj.load(str(hot.file(".dcd")), top=str(STRUCTURE))) == len(rows)

    def test_bad_settings(self, run):
        with pytest.raises(ConfigurationError, match="the first a multiple of the second"):
            replace(run, steps=601)
        with pytest.raises(ConfigurationError, match="must be positive"):
            replace(run, step_fs=0.0)
        with pytest.raises(ConfigurationError, match="no platform 'Abacus'"):
            run_model_dynamics(replace(run, platform="Abacus"))
        with pytest.raises(ConfigurationError, match="does not exist"):
            run_model_dynamics(replace(run, structure=Path("nothing.pdb")))

    def test_another_molecule(self, run, tmp_path):
        proline = STRUCTURE.with_name("proline_dipeptide.pdb")
        with pytest.raises(ConfigurationError, match=r"26 particles, .* 22"):
            run_model_dynamics(replace(run, structure=proline))
        swapped = STRUCTURE.read_text().replace("  CB  ALA", "  XB  ALA")
        lines = [line[:76] + " N" + line[78:] if "XB  ALA" in line else line for line in swapped.splitlines()]
        (tmp_path / "swapped.pdb").write_text("\n".join(lines) + "\n")
        with pytest.raises(MoleculeMismatchError):
            run_model_dynamics(replace(run, structure=tmp_path / "swapped.pdb"))


def frames_of(run: ModelDynamics) -> bytes:
    """The trajectory without the date in its header."""
    content = run.file(".dcd").read_bytes()
    return content[:180] + content[260:]


def test_the_command(shared_morse_file, tmp_path):
    arguments = ["md", str(shared_morse_file), "--structure", str(STRUCTURE), "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(application, [*arguments, "--steps", "200"])
    assert done.exit_code == 0, done.output
    assert "run.dcd" in done.output.replace("\n", "")
    assert len(table(ModelDynamics(shared_morse_file, STRUCTURE, tmp_path / "run", 200))) == 2
    failed = CliRunner().invoke(application, [*arguments, "--steps", "250"])
    assert failed.exit_code == 1
    assert "a multiple" in failed.output


def test_checkpoints_are_every_fifty_frames():
    assert model_dynamics._CHECKPOINT_EVERY == 50  # what the docstring says, and the tests above rely on
