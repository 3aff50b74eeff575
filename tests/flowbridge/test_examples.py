"""The example scripts, in a small size."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

import flowbridge
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.workflows.boltzmann.pipeline import run_workflow_file

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "circular": "soft",
    "torsions": {"couplings": 1, "components": 3, "hidden": [8]},
    "stiff": {"couplings": 1, "hidden": [8]},
}

SMALL_WORKFLOW = """
extends = "reweight_trajectory.toml"
[model.flow]
torsions = { couplings = 1, components = 3, hidden = [8] }
stiff = { couplings = 1, hidden = [8] }
[model.training]
likelihood = { steps = 20, batch = 64 }
refinement = { steps = 5, batch = 32 }
[dynamics]
nve_steps = 10
nve_runs = 1
equilibration_steps = 5
replicas = 2
langevin_steps = 20
langevin_step_fs = 0.25
discarded_steps = 5
frame_interval = 5
ase_nve_steps = 5
ase_langevin_steps = 5
[reweight]
samples = 300
bootstrap = 20
"""


def example(name: str):
    """Return a script of the examples as a module."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_file(alanine, tmp_path_factory) -> Path:
    """A small untrained flow of alanine dipeptide, its ranges taken from dynamics."""
    system = app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(alanine.topology)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(alanine.positions)
    frames = []
    for _ in range(400):
        integrator.step(20)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    design = FlowConfiguration.model_validate(SMALL)
    model = BoltzmannGenerator.untrained(alanine.particles, 300.0, np.array(frames), design)
    file = tmp_path_factory.mktemp("models") / "alanine.flow"
    flowbridge.save(model, file)
    return file


def test_boltzmann_moves(model_file, capsys):
    example("boltzmann_moves").main(str(model_file), 300)
    assert "of 12 proposals accepted" in capsys.readouterr().out


def test_openmm_script(model_file, capsys):
    example("openmm_script").main(str(model_file), 20)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["4", "8", "12", "16", "20"]


def test_ase_script(model_file, capsys):
    example("ase_script").main(str(model_file), 20)
    shown = capsys.readouterr().out
    assert "relaxed: " in shown
    assert "dynamics: 20 steps" in shown


def test_reweight_trajectory(alanine, tmp_path):
    """The workflow as it is, smaller, on a trajectory next to it."""
    system = app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(alanine.topology)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(1)
    simulation = app.Simulation(alanine.topology, system, integrator, openmm.Platform.getPlatform("Reference"))
    simulation.context.setPositions(alanine.positions)
    simulation.step(1000)
    simulation.reporters.append(app.DCDReporter(str(tmp_path / "alanine_dipeptide.dcd"), 10))
    simulation.step(3000)
    simulation.reporters.clear()
    for name in ("alanine_dipeptide.pdb", "alanine_dipeptide.toml", "reweight_trajectory.toml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "small.toml").write_text(SMALL_WORKFLOW)
    results = run_workflow_file(tmp_path / "small.toml", tmp_path / "out")
    assert results["training_frames"] == 270
    assert results["samples"] == 300
    report = (tmp_path / "out" / "report.html").read_text()
    assert "read from alanine_dipeptide.dcd" in report


def test_mixed_system(model_file, capsys):
    pytest.importorskip("openmmml", reason="openmmml is not installed: pip install openmmml")
    example("mixed_system").main(str(model_file), steps=10, box=2.2)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("10,")
    assert np.isfinite([float(value) for value in lines[-1].split(",")]).all()


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
def test_zuko_in_openmm(capsys):
    """Trained for a second, and still not far off."""
    pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")
    data, driven = example("zuko_in_openmm").main(steps=150, frames=3000, check=100)
    assert "mean distance" in capsys.readouterr().out
    assert 0.3 < data < 0.7
    assert abs(driven - data) < 0.15


def test_stochastic_flow(tmp_path, capsys):
    """Trained for a second: reweighting makes up for it."""
    pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")
    results = example("stochastic_flow").main(steps=15, figure=str(tmp_path / "figure.png"), samples=5000)
    assert "reweighted" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for value in results.values():
        assert abs(value - results["exact"]) < 1.0


def test_rank_one_layers(tmp_path):
    results = example("rank_one_layers").main(steps=20, figure=str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert all(np.isfinite(value) for value in results.values())


def test_annealed_samples(model_file, capsys):
    shares = example("annealed_samples").main(str(model_file), count=5, rungs=2, steps=2)
    assert "after annealing" in capsys.readouterr().out
    assert all(20.0 - 1e-6 <= share <= 100.0 for share in shares)


def test_equivariant_flow(tmp_path, capsys):
    share = example("equivariant_flow").main(tmp_path, equilibration=40, frames=5, steps=60, draws=200)
    assert share > 0.5
    assert "effective sample size" in capsys.readouterr().out
    assert {"dw4.flow", "dw4.h5", "dw4.png"} <= {file.name for file in tmp_path.iterdir()}
    assert flowbridge.load(tmp_path / "dw4.flow").metadata.particles.names == ("Ar",) * 4


def test_cool_ice(tmp_path, capsys):
    """The harmonic contraction of ice from 250 K to 100 K; the free energy is -41.86 kT a molecule."""
    pytest.importorskip("genice2", reason="GenIce2 is not installed: pip install 'flowbridge[flow-families]'")
    percent, difference, error = example("cool_ice").main(frames=120, figure=tmp_path / "cooled.png")
    assert percent > 10
    assert abs(difference / 16 + 41.863) < 4 * error / 16 + 0.006
    assert error / 16 < 0.02
    assert "effective sample size at 100 K" in capsys.readouterr().out
    assert (tmp_path / "cooled.png").stat().st_size > 10_000


def test_density_script(tmp_path, capsys):
    """The molecule of the least work, in a small size."""
    pyscf = pytest.importorskip("pyscf", reason="pyscf is not installed: pip install 'flowbridge[densities]'")
    before = pyscf.lib.num_threads()
    pyscf.lib.num_threads(1)  # its threads wait for each other on a busy machine
    small = {
        "sweeps": 8,
        "interval": 2,
        "equilibration": 40,
        "iterations": 1,
        "optimisation_sweeps": 3,
        "basis": "cc-pvdz",
    }
    example("density_script").main("H2", 64, str(tmp_path), **small)
    pyscf.lib.num_threads(before)
    shown = capsys.readouterr().out
    assert "energy      -1.1" in shown
    assert "density at the nuclei" in shown
    assert (tmp_path / "H2.cube").is_file()
    assert (tmp_path / "H2.png").is_file()


def test_private_training(tmp_path, capsys):
    """Few steps and a generous budget; the models carry their ledgers."""
    pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
    accuracies = example("private_training").main(tmp_path, epsilons=(8.0,), steps=15)
    assert min(accuracies["dp_mac"] + accuracies["dp_sgd"]) > 50.0
    assert "differential privacy for each digit" in capsys.readouterr().out
    assert (tmp_path / "private_training.png").stat().st_size > 10_000
    assert flowbridge.load(tmp_path / "dp_mac-8.flow").privacy["releases"][0]["noise"] == "cryptographic"


def test_private_force_field(tmp_path, capsys):
    """Few trajectories, few steps, a budget of little use: force fields that are run, and carry their ledgers."""
    pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus")
    errors = example("private_force_field").main(
        tmp_path, trajectories=40, frames=4, steps=30, sampling_rate=0.2, epsilons=(4.0,)
    )
    assert max(errors["dp_mac"] + errors["dp_sgd"]) < 1.0
    assert "differential privacy for each trajectory" in capsys.readouterr().out
    assert (tmp_path / "private_force_field.png").stat().st_size > 10_000
    ledger = flowbridge.load(tmp_path / "dp_mac-4.flow").privacy
    assert (ledger["releases"][0]["mechanism"], ledger["units"]) == ("dp_mac", 32)


def test_reinforce_builder(tmp_path, capsys):
    pytest.importorskip("tblite")
    results = example("reinforce_builder").main("CH4O", rounds=1, figure=str(tmp_path / "figure.png"), count=4)
    assert "reinforced: " in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert set(results) == {"imitation", "reinforced"}
