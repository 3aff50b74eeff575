"""``flowbridge doctor``: what it tries, and what it says about broken installations."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.workflows.diagnostics import doctor
from flowbridge.workflows.diagnostics.doctor import Finding, core_works, examine


def outcomes_of(*calls):
    return list(doctor._outcomes(calls))


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "flowbridge", "doctor", "--json", "--quick"]
    return subprocess.run(command, capture_output=True, text=True)


def test_doctor_finds_the_core_working(report):
    assert report.returncode == 0, report.stdout
    content = json.loads(report.stdout)
    assert content["core_works"] is True
    found = {(f["section"], f["name"]): f for f in content["findings"]}
    for section, name in (
        ("core", "a potential in torch, OpenMM and ASE"),
        ("platforms", "Reference"),
        ("platforms", "CPU"),
        ("backends", "PythonForce"),
        ("packages", "torch"),
    ):
        assert found[section, name]["works"], found[section, name]
    assert {"TorchForce", "PythonTorchForce"} <= {name for _, name in found}
    for finding in content["findings"]:
        assert finding["detail"], finding  # a reason or a measurement for everything


def broken_package(folder, name, code):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return str(folder)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN5torch3jit')", "undefined symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("print('{ not json'); import os; os._exit(3)", "no message"),
        (
            "class TorchForce:\n  def __init__(self, module): raise RuntimeError('built for another torch')",
            "another",
        ),
    ],
)
def test_a_broken_openmmtorch_is_reported_and_breaks_nothing(tmp_path, code, reason):
    path = broken_package(tmp_path, "openmmtorch", code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        broken, following = outcomes_of(("torch_force",), ("python_force", "Reference"))
    assert reason in broken["error"]
    assert following["error"] is None  # tried all the same


def test_a_package_that_crashes_is_blamed_and_the_others_are_still_tried(tmp_path, monkeypatch):
    broken_package(tmp_path, "h5py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    broken_package(tmp_path, "jinja2", "raise ImportError('half an installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("numpy", "h5py", "jinja2", "safetensors")
    outcomes = outcomes_of(*(("import_package", name) for name in names))
    errors = {name: outcome["error"] for name, outcome in zip(names, outcomes, strict=True)}
    assert errors["numpy"] is None
    assert "signal 11" in errors["h5py"]
    assert "half an installation" in errors["jinja2"]
    assert errors["safetensors"] is None
    found = {
        finding.name: finding
        for finding in doctor._packages(doctor._requirements(), dict(zip(names, outcomes, strict=True)))
    }
    assert found["numpy"].works
    assert "cannot be imported: ImportError: half an installation" in found["jinja2"].detail
    assert not found["h5py"].works


def test_a_probe_that_hangs_is_ended_and_the_others_are_still_tried(tmp_path, monkeypatch):
    broken_package(tmp_path, "h5py", "while True: pass")
    monkeypatch.setattr(doctor, "_TIME_LIMIT", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hanging, following = outcomes_of(("import_package", "h5py"), ("import_package", "safetensors"))
    assert hanging["error"] == "no answer within 2 s"
    assert following["error"] is None


def test_doctor_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (outcome,) = outcomes_of(("compile_cpp",))
    assert "no-such-compiler" in outcome["error"]


def test_a_broken_openmm_breaks_the_core_and_gives_exit_code_1(tmp_path, monkeypatch):
    broken_package(tmp_path, "openmm", "raise ImportError('libOpenMM.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    core = next(examine(quick=True))
    platforms = doctor._finding("platforms", "Reference", True, *outcomes_of(("python_force", "Reference")))
    monkeypatch.setattr(doctor, "examine", lambda **_: iter([core, platforms]))
    result = CliRunner().invoke(application, ["doctor"])
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert text.count("libOpenMM.so") == 2
    assert "The core does not work here: a potential in torch, OpenMM and ASE, Reference." in text


def test_core_needs_only_what_is_required():
    fine = Finding("packages", "torch", True, "2.13", required=True)
    optional = Finding("backends", "TorchForce", False, "absent")
    assert core_works([fine, optional])
    assert not core_works([fine, Finding("platforms", "Reference", False, "gone", required=True)])


def test_what_is_tried_is_announced_before():
    announced = []
    findings = examine(quick=True, announce=announced.append)
    assert next(findings).section == "core"
    assert announced == ["core"]
    findings.close()
