"""The ``flowbridge`` command, run as users run it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.compilation.compiled_potential import CompiledPotential
from flowbridge.core.errors import ModelFileError
from flowbridge.core.evaluator import EvaluationOptions, Evaluator
from flowbridge.core.model_files.files import read_header, register_kind, save
from flowbridge.core.potential import Particles, Potential, PotentialMetadata

COMMAND = [sys.executable, "-m", "flowbridge"]


@register_kind
class Tether(Potential):
    """A water molecule tied to the origin."""

    kind = "test_tether"

    def __init__(self):
        super().__init__()
        particles = Particles(("O", "H1", "H2"), (8, 1, 1), (15.999, 1.008, 1.008), ((0, 1), (0, 2)))
        self.metadata = PotentialMetadata(particles, temperature=310.0, global_parameters={"pull": 2.0})
        self.stiffness = torch.nn.Parameter(torch.ones(1200))
        self.register_buffer("steps", torch.tensor(7))

    def configuration(self):
        return {"networks": {"layers": 3, "width": [64, 64]}}

    @classmethod
    def from_configuration(cls, configuration):
        return cls()


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "water.flow"
    save(Tether(), path, provenance={"training": {"ess_percent": 91.23456789, "note": "[bold]short[/bold]"}})
    return path


def run(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def invoke(*arguments):
    return CliRunner().invoke(application, list(map(str, arguments)))


def test_help_lists_the_commands_and_loads_no_engine():
    code = (
        "import sys\nfrom flowbridge.commands.application import application\n"
        "application(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'openmm', 'ase', 'numpy', 'pydantic', 'rich.progress') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("run", "reference", "info", "doctor", "compile", "coarse-grain", "build", "isomers"):
        assert f"\n  {command} " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    import flowbridge

    assert invoke("--version").output == f"flowbridge {flowbridge.__version__}\n"


def test_info_shows_the_header(model):
    result = invoke("info", model)
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for expected in (
        "test_tether", "H2O, 3 particles, 2 bonds", "310 K", "pull = 2", "1,201 in 2 tensors",
        "1,200 F32, 1 I64", "training.ess_percent 91.2346", "networks.width [64, 64]", "energy kJ/mol",
        "[bold]short[/bold]",
    ):  # fmt: skip
        assert expected in text
    assert read_header(model).digest in text.replace(" ", "")


def test_info_as_json(model):
    content = json.loads(invoke("info", model, "--json").stdout)
    assert content["digest"] == read_header(model).digest
    assert content["formula"] == "H2O"
    assert content["tensors"]["stiffness"] == {"dtype": "F32", "shape": [1200]}
    assert content["provenance"]["training"]["ess_percent"] == 91.23456789


def test_errors_are_one_readable_message_without_traceback(model):
    model.write_bytes(model.read_bytes()[:-3])
    done = run("info", model)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {model}: truncated")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_debug_keeps_the_error_with_its_traceback(model):
    model.write_bytes(b"ATOM")
    result = invoke("info", model, "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ModelFileError)


@pytest.mark.parametrize("command", ["run", "reference"])
def test_missing_and_misspelt_workflows(tmp_path, command):
    result = invoke(command, tmp_path / "absent.toml")
    assert result.exit_code == 1
    assert "absent.toml does not exist" in " ".join(result.stderr.split())
    path = tmp_path / "misspelt.toml"
    path.write_text('[molecule]\nname = "x"\ntemprature = 300.0\n')
    result = invoke(command, path)
    assert result.exit_code == 1
    assert "temprature" in result.stderr
    assert "Traceback" not in result.output


def test_workers_must_be_positive(tmp_path):
    assert invoke("run", tmp_path / "a.toml", "--workers", "0").exit_code == 2


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
def test_interruption_says_how_to_continue(tmp_path):
    pipe = tmp_path / "workflow.toml"
    code = (
        "import signal, sys, time\n"
        # A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from flowbridge.commands.application import application\n"
        "from flowbridge.workflows.boltzmann import reference\n"
        "def endless(config, workers):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "reference.compute_reference = endless\n"
        "application(['reference', sys.argv[1]])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, pipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "interrupted: repeat the same command to continue where it stopped\n"


def test_console_script_is_installed():
    assert Path(sys.executable).with_name("flowbridge").is_file()


def test_compile_makes_what_adapters_look_for(compiled_morse_file, monkeypatch):
    file, stdout, stderr = compiled_morse_file
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(file.parent))
    assert "compiling morse.flow (batch 1, float64 positions)" in stderr
    assert re.search(r"1 +\d+ +\d+ +\d+\.\d", stdout)
    assert str(file.parent) in stdout
    again = invoke("compile", file)
    assert again.exit_code == 0
    assert "compiling" not in again.stderr
    found = Evaluator.of(file, EvaluationOptions(compilation="cached")).evaluated
    assert isinstance(found, CompiledPotential)


def test_compile_says_what_is_wrong(shared_morse_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))
    done = invoke("compile", shared_morse_file, "--dtype", "float16")
    assert done.exit_code == 1
    assert "--dtype must be float32 or float64, got 'float16'" in done.stderr
    monkeypatch.setenv("CXX", "/nowhere/g++")
    done = invoke("compile", shared_morse_file)
    assert done.exit_code == 1
    assert "install g++" in done.stderr
