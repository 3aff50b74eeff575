"""The example scripts, in a small size."""

import importlib.util
from pathlib import Path

import numpy as np
import openmm
import pytest
from flowbridge.flows.boltzmann_generator import BoltzmannGenerator
from flowbridge.flows.configuration import FlowConfiguration
from openmm import app, unit

import flowbridge

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "circular": "soft",
    "torsions": {"couplings": 1, "components": 3, "hidden": [8]},
    "stiff": {"couplings": 1, "hidden": [8]},
}


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
