"""What the README shows is run as it stands there."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from openmm import LangevinMiddleIntegrator, Platform, unit
from openmm.app import ForceField, PDBFile, Simulation

import flowbridge
from flowbridge.commands.application import application
from flowbridge.integrations.openmm.forces.particles import particles_from_topology

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    """The code blocks of a language with the line each begins at."""
    return [
        pytest.param(
            match[2],
            README.count("\n", 0, match.start(2)),
            id=f"line{README.count(chr(10), 0, match.start(2)) + 1}",
        )
        for match in BLOCK.finditer(README)
        if match[1] == language
    ]


def words_after(command):
    return [
        line.partition("#")[0].split()[1:]
        for match in BLOCK.finditer(README)
        if match[1] == "sh"
        for line in match[2].splitlines()
        if line.split()[:1] == [command]
    ]


def simulated_frames(pdb):
    """Frames ``(F, N, 3)`` in nm of a short simulation, for the flow to take its ranges from."""
    system = ForceField("amber96.xml", "amber96_obc.xml").createSystem(pdb.topology)
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 1 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    simulation = Simulation(pdb.topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setPositions(pdb.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    frames = []
    for _ in range(300):
        simulation.step(20)
        positions = simulation.context.getState(getPositions=True).getPositions(asNumpy=True)
        frames.append(positions.value_in_unit(unit.nanometer))
    return np.array(frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with alanine.pdb and a small untrained alanine.flow, as a reader of the README would have."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "examples" / "alanine_dipeptide.pdb", folder / "alanine.pdb")
    pdb = PDBFile(str(folder / "alanine.pdb"))
    particles = particles_from_topology(pdb.topology)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = flowbridge.BoltzmannGenerator.untrained(particles, 300.0, simulated_frames(pdb))
    flowbridge.save(generator, folder / "alanine.flow")
    return folder


@pytest.mark.parametrize(("code", "line"), blocks("python"))
def test_python_block(code, line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # The blank lines make tracebacks point into the README.
    exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), {"__name__": "readme"})


def test_there_are_python_blocks():
    assert len(blocks("python")) >= 4


def test_commands_exist():
    commands = words_after("flowbridge")
    assert len(commands) >= 4
    known = typer.main.get_command(application).commands
    for words in commands:
        assert words[0] in known, words
        for option in (word for word in words if word.startswith("-")):
            assert any(option in parameter.opts for parameter in known[words[0]].params), option


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = words_after("make")
    assert targets == [["demo"], ["check"], ["test"], ["test-torchforce"]]
    for (target,) in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_workflows_exist():
    files = {word for words in words_after("flowbridge") for word in words if word.endswith(".toml")}
    assert files
    for file in files:
        assert (ROOT / file).is_file()
