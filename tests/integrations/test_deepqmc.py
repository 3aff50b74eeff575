"""The bridge to DeepQMC: what its environment writes, and, where that environment is, the whole way."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.storage import load_samples
from flowbridge.calculators.qmc.wave_function.wave_function import potential_energy
from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError, ModelFileError, WorkerError
from flowbridge.integrations.deepqmc import EXPORT, REQUIREMENTS, export_samples

PYTHON = os.environ.get("FLOWBRIDGE_DEEPQMC_PYTHON", "")
"""Interpreter of an environment with DeepQMC, for the test that trains a wave function."""


@pytest.fixture(scope="module")
def export():
    """The script, which needs NumPy alone until it meets a checkpoint."""
    specification = importlib.util.spec_from_file_location("deepqmc_export", EXPORT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_files_of_the_export_are_files_of_samples(export, tmp_path):
    molecule = Molecule.build([3, 1], [[0, 0, 0], [0, 0, 3.0]])
    random = np.random.default_rng(0)
    positions = random.normal(size=(3, 5, 4, 3))
    potential = np.stack([export.coulomb(molecule.to_dict(), sweep) for sweep in positions])
    for sweep, found in zip(positions, potential, strict=True):
        np.testing.assert_allclose(found, potential_energy(molecule, torch.as_tensor(sweep)), rtol=1e-12)
    arrays = {
        "positions": positions,
        "scores": random.normal(size=positions.shape),
        "kinetic": random.normal(size=(3, 5)),
        "potential": potential,
        "log_absolute": random.normal(size=(3, 5)),
    }
    file = tmp_path / "samples"
    blob = export.encode(molecule.to_dict(), arrays, 0.5)
    file.write_bytes(blob)
    samples = load_samples(file, molecule)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(samples, name), array)
    assert samples.acceptance == 0.5
    file.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(ModelFileError, match="was altered"):
        load_samples(file)


def test_what_cannot_be_exported_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="requirements"):
        export_samples(tmp_path / "python", tmp_path, tmp_path / "samples")
    python = shutil.which("python3")
    with pytest.raises(ConfigurationError, match="no such directory"):
        export_samples(python, tmp_path / "nothing", tmp_path / "samples")
    # This Python has no DeepQMC, and the directory no training.
    with pytest.raises(WorkerError, match=r"deepqmc|hydra|config\.yaml"):
        export_samples(python, tmp_path, tmp_path / "samples")
    done = CliRunner().invoke(application, ["deepqmc", str(tmp_path), "out", "--python", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "there is no such Python" in done.output
    assert "deepqmc==" in REQUIREMENTS.read_text()


@pytest.mark.skipif(not Path(PYTHON).is_file(), reason="FLOWBRIDGE_DEEPQMC_PYTHON names no environment with DeepQMC")
def test_a_trained_wave_function_gives_a_density(tmp_path):
    from flowbridge.calculators.qmc.density_run import DensityRun, RunSettings
    from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings

    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [
            str(Path(PYTHON).with_name("deepqmc")), "hamil/mol=H2", "task.steps=20", "task.electron_batch_size=64",
            "task.pretrain_steps=20", f"hydra.run.dir={tmp_path}",
        ],
        check=True, capture_output=True, env=environment,
    )  # fmt: skip
    options = ["--walkers", "128", "--sweeps", "30", "--interval", "5", "--equilibration", "200"]
    samples = export_samples(PYTHON, tmp_path / "training", tmp_path / "samples", options=options)
    assert samples.molecule.numbers == (1, 1)
    assert -1.19 < samples.energy.value < -1.0
    # Green's theorem: <|grad ln Psi|^2> is twice the kinetic energy, only if scores, samples and energies belong together.
    virial = samples.average(samples.scores.square().sum((2, 3)) / 8.0)
    kinetic = samples.average(samples.kinetic)
    assert virial.value == pytest.approx(kinetic.value, abs=5 * (virial.error + kinetic.error))
    settings = RunSettings(TrialSettings(basis="cc-pvdz", grid_level=2), spin_densities=False)
    found = DensityRun(samples.molecule, settings, samples=samples).properties
    assert float(found.electrons().value) == pytest.approx(2.0, abs=1e-6)
    assert float(found.dipole().value[0]) == pytest.approx(0.0, abs=5 * float(found.dipole().error[0]) + 1e-6)
    assert 4.0 < float(found.second_moment().value) < 7.0
