"""The package as users meet it: a light import, and distributions that hold everything."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flowbridge

ROOT = Path(__file__).parents[2]
ENGINES = ("torch", "openmm", "ase", "mdtraj", "pymbar", "numpy")


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def tree_modules():
    """Every module of the package, by its path inside an installation; links are followed, as import does."""
    return {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "flowbridge", followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def test_import_loads_no_engine_and_not_even_torch():
    code = f"""
import json, sys
import flowbridge
loaded = [name for name in {ENGINES} if name in sys.modules]
names = dir(flowbridge)
still = [name for name in {ENGINES} if name in sys.modules]
print(json.dumps([loaded, still, names, flowbridge.__version__]))
"""
    loaded, still, names, version = python(code)
    assert loaded == []
    assert still == []
    assert set(flowbridge.__all__) <= set(names)
    assert version == flowbridge.__version__


def test_names_load_on_first_use_and_are_the_ones_of_their_rooms():
    from flowbridge.core import potential
    from flowbridge.core.model_files import files as model_files

    assert flowbridge.load is model_files.load
    assert flowbridge.save is model_files.save
    assert flowbridge.Potential is potential.Potential
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = flowbridge.lod


@pytest.mark.parametrize("name", flowbridge.__all__)
def test_every_public_name_exists(name):
    assert getattr(flowbridge, name) is not None


def test_rooms_without_engines_import_no_engine():
    code = """
import importlib, json, pkgutil, sys
import flowbridge
rooms = ("core", "flows", "forcefields")
for room in rooms:
    package = importlib.import_module(f"flowbridge.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(json.dumps([name for name in ("openmm", "ase", "pyscf") if name in sys.modules]))
"""
    assert python(code) == []


def test_every_folder_with_code_is_a_package():
    folders = {Path(name).parent for name in tree_modules()}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("room", ["flows", "forcefields", "calculators", "integrations"])
def test_no_module_has_two_names(room):
    """The top-level folders are reachable from a checkout's root: nothing in them imports but as part of flowbridge."""
    assert (ROOT / "flowbridge" / room).readlink() == Path("..", room)
    modules = [path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / room).rglob("*.py")]
    code = f"""
import importlib, json
found = []
for name in {[name.replace("/", ".").removesuffix(".__init__") for name in modules]!r}:
    try:
        importlib.import_module(name)
        found.append(name)
    except ImportError:
        pass
print(json.dumps(found))
"""
    assert python(code, PYTHONPATH=str(ROOT)) == []


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist of a copy of the tree, and the wheel built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def run(step, cwd):
        done = subprocess.run([sys.executable, "-c", build, step, folder], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("build_sdist", source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run("build_wheel", unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_wheel_from_the_sdist_holds_every_module_and_data_file(distributions):
    _, wheel = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flowbridge/workflows").rglob("*.html")}
    assert tree_modules() | data | {"flowbridge/py.typed"} <= names
    top = {name.partition("/")[0] for name in names}
    assert top == {
        "flowbridge",
        f"flowbridge-{flowbridge.__version__}.dist-info",
    }  # nothing generic next to it
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_build_needs(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "flowbridge/py.typed"} <= names


def test_constraints_pin_one_torch_without_a_local_version():
    pins = (ROOT / "constraints.txt").read_text().split()
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    assert "+" not in torch  # torch==X is satisfied by X+cpu, and not the other way round
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)
