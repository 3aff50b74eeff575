"""The ways into ASE besides importing the calculator: its plugins, its names, its socket."""

import subprocess
import sys
import uuid
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import get_calculator_class
from ase.calculators.socketio import SocketIOCalculator
from ase.md.verlet import VelocityVerlet

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError
from flowbridge.core.model_files.files import save
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.socket import serve

STRUCTURE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide.pdb"


@pytest.fixture(scope="module")
def model_file(alanine, tmp_path_factory):
    """A small flow in a file that other processes can read, with parameters off their start."""
    design = FlowConfiguration.model_validate(
        {"torsions": {"couplings": 1, "components": 3, "hidden": [4]}, "stiff": {"couplings": 1, "hidden": [4]}}
    )
    model = BoltzmannGenerator.untrained(alanine.particles, 300.0, alanine.shaken(400), design)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("socket") / "alanine.flow"
    save(model, path)
    return path


def test_ase_lists_the_plugin():
    listed = subprocess.run(
        [sys.executable, "-m", "ase", "info", "--plugins"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "flowbridge" in listed.stdout


def test_ase_finds_the_class():
    from ase._4.plugins import plugins

    (found,) = [plugin for plugin in plugins if plugin.name == "flowbridge"]
    assert found.implementation is PotentialCalculator
    assert get_calculator_class("flowbridge") is PotentialCalculator


class TestSocket:
    def drive(self, name, steps=12):
        """Constant-energy dynamics whose forces come through the socket; return positions and energies."""
        atoms = ase.io.read(STRUCTURE)
        with SocketIOCalculator(unixsocket=name, timeout=60) as calculator:
            atoms.calc = calculator
            return self.dynamics(atoms, steps)

    @staticmethod
    def dynamics(atoms, steps):
        atoms.set_momenta(np.random.default_rng(1).normal(0.0, 0.1, (len(atoms), 3)))
        dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
        energies = []
        dynamics.attach(lambda: energies.append(atoms.get_potential_energy()))
        dynamics.run(steps)
        return atoms.positions.copy(), np.array(energies)

    def test_dynamics_over_a_unix_socket_is_dynamics_with_the_calculator(self, model_file):
        name = f"flowbridge-{uuid.uuid4().hex[:8]}"
        command = [sys.executable, "-m", "flowbridge", "socket", str(model_file), "--structure", str(STRUCTURE)]
        waiting = "import sys, time, pathlib, subprocess\n" \
            "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n" \
            "sys.exit(subprocess.call(sys.argv[2:]))"  # fmt: skip
        client = subprocess.Popen(
            [sys.executable, "-c", waiting, f"/tmp/ipi_{name}", *command, "--unix", name],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            positions, energies = self.drive(name)
        finally:
            shown, _ = client.communicate(timeout=60)
        assert client.returncode == 0, shown
        atoms = ase.io.read(STRUCTURE)
        atoms.calc = PotentialCalculator(model_file)
        directly, expected = self.dynamics(atoms, 12)
        # The protocol is in Bohr and Hartree: rounding only.
        assert np.allclose(energies, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
        assert np.allclose(positions, directly, rtol=0, atol=1e-8)

    def test_refused(self, model_file, tmp_path):
        with pytest.raises(ConfigurationError, match="exactly one of a UNIX socket and a port"):
            serve(model_file, STRUCTURE)
        with pytest.raises(ConfigurationError, match=r"nobody listens at /tmp/ipi_nowhere .*start the driver first"):
            serve(model_file, STRUCTURE, unix="nowhere")
        with pytest.raises(ConfigurationError, match="nobody listens at localhost:1 "):
            serve(model_file, STRUCTURE, port=1)
        with pytest.raises(ConfigurationError, match="cannot read one structure"):
            serve(model_file, tmp_path / "nothing.pdb", port=1)
        with pytest.raises(MoleculeMismatchError, match="26"):
            serve(model_file, STRUCTURE.with_name("proline_dipeptide.pdb"), port=1)
