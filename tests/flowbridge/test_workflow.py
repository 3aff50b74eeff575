"""The whole workflow in a tiny size, on a second molecule with a ring, killed in the middle and continued."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import mdtraj
import numpy as np
import pytest

from flowbridge.core.errors import ConfigurationError
from flowbridge.workflows.boltzmann.configuration import read_tables, read_workflow
from flowbridge.workflows.boltzmann.molecular_system import molecular_system
from flowbridge.workflows.coarse_graining.configuration import read_coarse_graining
from flowbridge.workflows.stages import StageFolder

EXAMPLES = Path(__file__).parents[2] / "examples"

TINY = f"""
output = "out"
seed = 3
workers = 2

[molecule]
name = "proline dipeptide"
structure = "{EXAMPLES / "proline_dipeptide.pdb"}"
force_field = ["amber96.xml", "amber96_obc.xml"]

[molecule.torsions]
phi = ["ACE:C", "PRO:N", "PRO:CA", "PRO:C"]
psi = ["PRO:N", "PRO:CA", "PRO:C", "NME:N"]

[simulate]
frames = 250
frame_interval = 20
equilibration_steps = 100
automatic_basins = 2
automatic_trajectories = 3

[model.flow.stiff]
couplings = 2
hidden = [32]

[model.flow.torsions]
couplings = 2
hidden = [32]

[model.training]
checkpoint_interval = 5
log_interval = 5

[model.training.likelihood]
steps = 80
batch = 128

[model.training.refinement]
steps = 20
batch = 128

[dynamics]
nve_steps = 20
nve_runs = 1
equilibration_steps = 10
replicas = 2
langevin_steps = 20
langevin_step_fs = 0.25
discarded_steps = 5
frame_interval = 5
ase_nve_steps = 5
ase_langevin_steps = 5

[reweight]
samples = 1000
bootstrap = 50
"""


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "flowbridge", "run", str(folder / "tiny.toml"), "--output", str(folder / "out")]


def run(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.toml").write_text(TINY)
    done = subprocess.run(command(folder), capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out" / "results.json").read_text())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def comparable(results: dict) -> dict:
    """Everything but the clock, and the digest, which covers the time of saving."""
    return {k: v for k, v in results.items() if k not in ("wall_seconds", "model_digest")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def test_trained_by_two_processes(undisturbed, tmp_path):
    """Under torchrun one process does what is done once, and both halves of a batch have the gradient of the whole."""
    _, alone = undisturbed
    # What follows the training needs no processes of its own next to those two.
    (tmp_path / "tiny.toml").write_text(TINY.replace("workers = 2", "workers = 1"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, *command(tmp_path)[2:]], capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training_frames"] == alone["training_frames"]
    curves = [
        json.loads(next((folder / "out" / "stages").glob("train-*/results.json")).read_text())["curves"]
        for folder in (undisturbed[0], tmp_path)
    ]
    whole, halves = ([point["held_out_nll"] for point in c["likelihood"] if "held_out_nll" in point] for c in curves)
    np.testing.assert_allclose(halves, whole, atol=0.02)
    assert len(curves[1]["refinement"]) == len(curves[0]["refinement"])
    assert 0.0 < results["ess_percent"] <= 100.0


def test_leaves_what_a_user_takes_away(undisturbed):
    folder, results = undisturbed
    output = folder / "out"
    assert (output / "report.html").stat().st_size > 50_000
    assert list((output / "figures").glob("*.png"))
    trajectory = mdtraj.load(str(output / "samples.h5"))
    assert trajectory.n_frames == 1000
    assert trajectory.n_atoms == 26
    with h5py.File(output / "samples.h5") as file:
        assert "flowbridge" in file
    import flowbridge

    model = flowbridge.load(output / "proline_dipeptide.flow")
    assert len(model.metadata.particles) == 26
    assert 0 < results["ess_percent"] <= 100
    assert results["ase_openmm_max_force_difference"] < 1e-4
    assert np.isfinite(results["force_rmse_kT_nm"])
    assert results["nve_std_per_dof_kJ_mol"] < 1.0


def test_a_killed_run_continues_to_the_same_numbers(undisturbed, tmp_path):
    _, expected = undisturbed
    (tmp_path / "tiny.toml").write_text(TINY)
    kills = 0
    # Kill without warning in three different places: while simulating, while training, in dynamics.
    for pattern in (
        "stages/simulate-*/trajectories/*.npz",
        "stages/train-*/checkpoints/*/checkpoint.safetensors",
        "stages/dynamics-*",
    ):
        process = subprocess.Popen(
            command(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and not list((tmp_path / "out").glob(pattern)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert comparable(run(tmp_path)) == comparable(expected)


def test_repeating_a_finished_run_repeats_nothing(undisturbed):
    folder, expected = undisturbed
    before = {file: file.stat().st_mtime_ns for file in (folder / "out" / "stages").glob("*/results.json")}
    assert run(folder)["wall_seconds"] == expected["wall_seconds"]
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_dynamics_out_of_the_support_cost_nobody_the_samples(undisturbed, tmp_path):
    """A time step far too long: the stage fails, says why, and the run ends with its weighted samples and a report."""
    shutil.copytree(undisturbed[0] / "out" / "stages", tmp_path / "out" / "stages")
    (tmp_path / "tiny.toml").write_text(TINY.replace("langevin_step_fs = 0.25", "langevin_step_fs = 200.0"))
    for folder in (tmp_path / "out" / "stages").glob("reweight-*"):
        shutil.rmtree(folder)
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 1
    assert "changed since the last time: dynamics.langevin_step_fs: 0.25 -> 200.0" in done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["failed"]) == {"dynamics"}
    assert " ".join(results["failed"]["dynamics"].split()) in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert mdtraj.load(str(tmp_path / "out" / "samples.h5")).n_frames == 1000
    assert results["ess_percent"] == undisturbed[1]["ess_percent"]
    assert results["failed"]["dynamics"][:60] in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_a_table_by_its_former_name_is_read_with_a_warning(tmp_path, capsys):
    (tmp_path / "old.toml").write_text(TINY.replace("[dynamics]", "[drive]"))
    (tmp_path / "new.toml").write_text('extends = "old.toml"\n[dynamics]\nnve_runs = 3\n')
    dynamics = read_workflow(tmp_path / "new.toml").dynamics
    assert (dynamics.nve_runs, dynamics.nve_steps) == (3, 20)
    assert "the table [drive] is called [dynamics] now" in capsys.readouterr().err
    (tmp_path / "both.toml").write_text(TINY + "[drive]\nnve_runs = 2\n")
    with pytest.raises(ConfigurationError, match=r"both \[dynamics\] and \[drive\]"):
        read_workflow(tmp_path / "both.toml")


FORCE_FIELD = 'force_field = ["amber96.xml", "amber96_obc.xml"]'
PHI = 'phi = ["ACE:C", "PRO:N", "PRO:CA", "PRO:C"]'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (FORCE_FIELD, "", "exactly one of force_field"),
        (FORCE_FIELD, 'force_field = ["tip3p.xml"]', "does not fit the molecule"),
        ("frames = 250", "framez = 100", r"simulate\.framez"),
        ("frames = 250", "frames = -1", r"simulate\.frames"),
        (PHI, "phi = [1, 2, 3]", r"molecule\.torsions\.phi"),
        (PHI, 'phi = ["ACE:C", "PRO:N", "PRO:CA", "PRO:QQ"]', "'PRO:QQ' fits 0 atoms"),
        ('name = "proline', "name = proline", "not valid TOML"),
        ("proline_dipeptide.pdb", "nothing.pdb", "does not exist"),
    ],
)
def test_unusable_files_are_refused_with_the_key_named(tmp_path, old, new, message):
    def load():
        workflow = read_workflow(path)
        molecule = molecular_system(workflow, tmp_path)
        return [molecule.torsion_atoms(atoms) for atoms in workflow.molecule.torsions.values()]

    path = tmp_path / "bad.toml"
    path.write_text(TINY)
    assert len(load()) == 2
    path.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigurationError, match=message):
        load()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.name)
def test_shipped_examples_are_valid(file):
    if "coarse" in file.name:
        assert read_coarse_graining(file).name
    else:
        assert read_workflow(file).molecule.name


def test_files_may_extend_each_other_but_not_in_circles(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1\nworkers = 3\n")
    (tmp_path / "b.toml").write_text('extends = "a.toml"\nseed = 2\n')
    (tmp_path / "c.toml").write_text('extends = "b.toml"\n[reweight]\nsamples = 7\n')
    assert read_tables(tmp_path / "c.toml") == {"seed": 2, "workers": 3, "reweight": {"samples": 7}}
    (tmp_path / "a.toml").write_text('extends = "c.toml"\n')
    with pytest.raises(ConfigurationError, match="extends it in turn"):
        read_tables(tmp_path / "c.toml")


def test_one_process_writes_what_all_open(monkeypatch, tmp_path):
    """Two that write the same file at the same time lose its unfinished part to each other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        stage = StageFolder.open(tmp_path, "train", {"steps": 3})
        assert (stage.folder / "inputs.json").is_file() is written
