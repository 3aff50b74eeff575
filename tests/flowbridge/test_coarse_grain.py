"""``flowbridge coarse-grain``: the whole way in a small size, resumed, and what is refused."""

import json
import shutil
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files.files import load
from flowbridge.workflows.coarse_graining.configuration import read_coarse_graining
from flowbridge.workflows.coarse_graining.pipeline import run_coarse_graining_file
from flowbridge.workflows.coarse_graining.reference import reference_model, reference_stage

EXAMPLES = Path(__file__).parents[2] / "examples"

SMALL = """
extends = "{example}"
output = "{output}"
[sampling]
runs = 2
frames = 150
equilibration_steps = 200
{sampling}
[network]
width = 16
depth = 2
[teacher]
blocks = 1
hidden = [8]
stiff = {{ couplings = 1, hidden = [8] }}
[training]
method = "{method}"
samples = 300
log_interval = 20
teacher = {{ steps = 30, batch = 32 }}
student = {{ steps = 30, batch = 32 }}
[dynamics]
replicas = 3
frames = 12
frame_interval = 5
equilibration_frames = 1
[analysis]
{analysis}
"""


def written(
    folder: Path, example: str, method: str = "flow_matching", sampling: str = "", analysis: str = "bins = 12"
) -> Path:
    for name in (example, "chignolin_cln025.pdb", "alanine_dipeptide.pdb"):
        shutil.copy(EXAMPLES / name, folder)
    text = SMALL.format(example=example, output=folder / "out", method=method, sampling=sampling, analysis=analysis)
    (folder / "small.toml").write_text(text)
    return folder / "small.toml"


def test_chignolin(tmp_path):
    pytest.importorskip("deeptime", reason="deeptime is not installed: pip install deeptime")
    file = written(tmp_path, "chignolin_coarse.toml", analysis="slow_lag = 5")
    done = CliRunner().invoke(application, ["coarse-grain", str(file)])
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["beads"] == 10
    assert results["frames"] == 300
    assert np.isfinite(results["folding_free_energy_difference_kt"])
    assert "Native contacts" in (out / "report.html").read_text()
    assert {file.name for file in (out / "figures").iterdir()} == {
        "folding.png", "native_contacts.png", "slow_coordinates.png", "training.png",
    }  # fmt: skip
    model = load(out / "model.flow")
    assert model.metadata.temperature == 300.0
    assert mdtraj.load(str(out / "beads.pdb")).n_atoms == 10
    # Nothing is done twice: the same command finds all stages.
    before = {path: path.stat().st_mtime_ns for path in (out / "stages").rglob("*.npz")}
    again = run_coarse_graining_file(file)
    assert again == results
    assert before == {path: path.stat().st_mtime_ns for path in (out / "stages").rglob("*.npz")}
    # Dynamics that were interrupted go on to the same frames.
    (stage,) = (out / "stages").glob("dynamics-*")
    with np.load(stage / "frames.npz") as stored:
        expected = stored["positions"]
    for name in ("results.json", "frames.npz", "pieces/00001.npz"):
        (stage / name).unlink()
    run_coarse_graining_file(file)
    with np.load(stage / "frames.npz") as stored:
        assert np.array_equal(stored["positions"], expected)


@pytest.mark.parametrize("method", ["force_matching", "noised_force_matching"])
def test_alanine(tmp_path, method):
    file = written(tmp_path, "alanine_coarse.toml", method, "bias.steps = 500")
    results = run_coarse_graining_file(file)
    assert results["force_map"] == "optimised"
    assert results["root_mean_square_force"] < results["root_mean_square_force_plain"]
    assert results["effective_percent"] < 100.0  # a bias was taken out
    assert results["torsions_mean_square_free_energy_error"] > 0.0
    assert (tmp_path / "out" / "figures" / "torsions.png").is_file()


@pytest.fixture
def trajectory(alanine, tmp_path):
    """A short trajectory of capped alanine as a DCD file, in the folder of the TOML."""
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(alanine.topology, constraints=None)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(1)
    simulation = app.Simulation(alanine.topology, system, integrator, openmm.Platform.getPlatform("Reference"))
    simulation.context.setPositions(alanine.positions * unit.nanometer)
    simulation.step(500)
    simulation.reporters.append(app.DCDReporter(str(tmp_path / "alanine.dcd"), 10))
    simulation.step(2000)
    return tmp_path / "alanine.dcd"


FROM_FILES = """
name = "alanine from a trajectory"
[all_atom]
structure = "alanine_dipeptide.pdb"
force_field = ["amber99sbildn.xml", "amber99_obc.xml"]
constraints = "none"
[trajectory]
files = ["alanine.dcd"]
[beads]
selections = {{ A = "resname ACE", B = "resname ALA and backbone", C = "resname ALA and sidechain", D = "resname NME" }}
[network]
kind = "graph"
width = 8
filters = 4
[training]
method = "{method}"
student = {{ steps = 20, batch = 32 }}
[dynamics]
replicas = 2
frames = 2
frame_interval = 5
step_fs = 1.0
"""


def test_from_a_trajectory_with_selections_and_a_graph_network(trajectory, tmp_path):
    shutil.copy(EXAMPLES / "alanine_dipeptide.pdb", tmp_path)
    (tmp_path / "run.toml").write_text(FROM_FILES.format(method="force_matching"))
    results = run_coarse_graining_file(tmp_path / "run.toml", tmp_path / "out")
    assert results["frames"] == 200
    assert results["beads"] == 4
    assert load(tmp_path / "out" / "model.flow").metadata.particles.names == ("A", "B", "C", "D")


IN_WATER = """
extends = "alanine_coarse_tip3p.toml"
workers = 1
[all_atom]
water_box = 1.8
cutoff = 0.7
[sampling]
runs = 1
frames = 4
frame_interval = 2
equilibration_steps = 2
platform = "CPU"
"""


def test_frames_in_water_hold_the_molecule(tmp_path):
    """The recipe of explicit solvent: forces on the molecule include those of the water, whose positions are not kept."""
    for name in ("alanine_coarse_tip3p.toml", "alanine_dipeptide.pdb"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "water.toml").write_text(IN_WATER)
    settings = read_coarse_graining(tmp_path / "water.toml")
    model = reference_model(settings, tmp_path)
    assert model.system.getNumParticles() > 300
    assert len(model.constraints) == 12
    stage = reference_stage(settings, model, tmp_path).completed(tmp_path / "out", {})
    with np.load(stage.folder / "trajectories" / "000.npz") as data:
        assert data["positions"].shape == (4, 22, 3)
        vacuum = openmm.Context(
            model.molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
        )
        vacuum.setPositions(data["positions"][-1])
        alone = vacuum.getState(forces=True).getForces(asNumpy=True)._value
        assert np.abs(data["forces"][-1] - alone).max() > 50.0


class TestRefused:
    def test_frames_of_another_molecule(self, trajectory, tmp_path):
        frames = mdtraj.load(str(trajectory), top=str(EXAMPLES / "alanine_dipeptide.pdb"))
        frames.atom_slice(range(20)).save(str(trajectory))
        shutil.copy(EXAMPLES / "alanine_dipeptide.pdb", tmp_path)
        (tmp_path / "run.toml").write_text(FROM_FILES.format(method="flow_matching"))
        done = CliRunner().invoke(
            application, ["coarse-grain", str(tmp_path / "run.toml"), "--output", str(tmp_path / "o")]
        )
        assert done.exit_code == 1
        assert "22 particles" in done.output

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("[beads]\nname = 'six_beads'", "six_beads|five_beads"),
            ("[beads]\nname = 'five_beads'\nselections = { A = 'all' }", "not both"),
            ("[structure_based]\nstructure = 'x.pdb'\nepsilon = 1.0", "exactly one"),
            ("[network]\nkind = 'invariant'\nwidht = 3", "widht"),
            ("[analysis]\ntorsions = { a = [0,1,2,3], b = [0,1,2,3], c = [0,1,2,3] }", "one or two torsions"),
        ],
    )
    def test_settings(self, tmp_path, change, message):
        shutil.copy(EXAMPLES / "alanine_coarse.toml", tmp_path)
        (tmp_path / "bad.toml").write_text('extends = "alanine_coarse.toml"\n' + change)
        with pytest.raises(ConfigurationError, match=message):
            read_coarse_graining(tmp_path / "bad.toml")

    def test_missing_trajectory(self, tmp_path):
        shutil.copy(EXAMPLES / "alanine_dipeptide.pdb", tmp_path)
        (tmp_path / "run.toml").write_text(FROM_FILES.format(method="flow_matching"))
        with pytest.raises(ConfigurationError, match=r"alanine.dcd does not exist"):
            run_coarse_graining_file(tmp_path / "run.toml", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["alanine_coarse.toml", "alanine_coarse_tip3p.toml", "chignolin_coarse.toml", "chignolin_coarse_quick.toml"]
)
def test_the_examples_are_valid(name):
    assert read_coarse_graining(EXAMPLES / name).name
