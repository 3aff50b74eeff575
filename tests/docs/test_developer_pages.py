"""The pages for developers are run as they stand, and what they build passes the conformance checks."""

import re
from pathlib import Path

import pytest

import flowbridge
from flowbridge.core.model_files import kinds
from flowbridge.flows.transforms.registry import TRANSFORMS
from flowbridge.testing import check_potential, check_transform

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "developers"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def walked(tmp_path, monkeypatch):
    """Function: name of a page to what its blocks define, run one after the other in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "_registered", dict(kinds._registered))
    before = dict(TRANSFORMS)

    def walk(name):
        page = PAGES / f"{name}.md"
        text, names = page.read_text(), {"__name__": name}
        for block in BLOCK.finditer(text):
            # The blank lines make tracebacks point into the page.
            lines = "\n" * text.count("\n", 0, block.start(1))
            exec(compile(lines + block[1], str(page), "exec"), names)
        return names

    yield walk
    TRANSFORMS.clear()
    TRANSFORMS.update(before)


def test_add_a_bijection(walked, alanine, tmp_path):
    names = walked("add_a_bijection")
    registered = TRANSFORMS["asinh"]
    for seed in range(3):
        check_transform(registered.make(4), registered.domain, seed)
    frames = alanine.shaken(400, 0.01)
    model = flowbridge.BoltzmannGenerator.untrained(alanine.particles, 300.0, frames, names["configuration"])
    used = {type(module).__name__ for module in model.modules()}
    assert "Asinh" in used
    assert "SinhArcsinh" not in used
    flowbridge.save(model, tmp_path / "alanine.flow")
    check_potential(flowbridge.load(tmp_path / "alanine.flow"), configurations=2, adapters=False)


def test_add_a_model_kind(walked):
    names = walked("add_a_model_kind")
    again = flowbridge.load("hydroxyl.flow")
    assert type(again) is names["MorseBond"]
    assert names["calculator"].potential.width == 20.0
    entry = re.search(r"^flowbridge\.model_kinds =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert entry, "the page names a section of setup.cfg that is not there"


def test_add_an_engine(walked):
    names = walked("add_an_engine")
    assert names["found"].success
    assert names["distance"] == pytest.approx(1.0, abs=1e-3)  # Angstrom


def test_every_page_is_walked_and_found_from_contributing():
    pages = {page.stem for page in PAGES.glob("*.md")}
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for page in pages:
        assert f"def test_{page}(" in tests or (ROOT / "tests" / "flowbridge" / f"test_{page}.py").is_file(), page
        assert f"docs/developers/{page}.md" in contributing


def test_every_room_of_the_changelog_exists():
    """The table of moved modules names packages and modules that are there."""
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Modules")[2]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| `")]
    named = {name.removesuffix(".*") for row in rows for name in re.findall(r"`([a-z_]+\.[\w.]+[\w*])`", row)}
    assert len(named) >= 25
    for name in named:
        path = ROOT / "flowbridge" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_slow_tests_exist():
    """``make slow-tests`` measures anew; a test that was renamed is renamed in the list."""
    for entry in (ROOT / "tests" / "slow_tests.txt").read_text().split():
        file, *_, name = entry.split("::")
        assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.MULTILINE), entry


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / ".pre-commit-config.yaml"):
        for target in re.findall(r"(?:`|^|entry: )make(?: --silent)? ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
