"""The page on adding a stage does what it says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "developers" / "add_a_stage.md"


def test_the_page_works_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    space: dict = {"__name__": "add_a_stage"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    masses = np.array([15.999, 1.008, 1.008])
    x = np.array([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.024, 0.0927, 0.0]])
    x -= masses @ x / masses.sum()
    radius = np.sqrt((masses @ (x**2).sum(1)) / masses.sum())
    assert space["results"]["radius_of_gyration_nm"] == pytest.approx(1.1 * radius)
    output = tmp_path / "runs" / "water"
    assert list((output / "stages").glob("radius-*/radius.npy"))
    shown = capsys.readouterr()
    assert "radius_of_gyration_nm" in shown.out
    assert "left out" in (output / "report.html").read_text()
    # The last call left the stage out, and says so.
    left = json.loads((output / "results.json").read_text())
    assert left["left_out"] == ["radius"]
    assert "radius_of_gyration_nm" not in left


def test_names_on_the_page_exist():
    """Files and keywords that the page names are in the tree."""
    root = PAGE.parents[2]
    text = PAGE.read_text()
    for name in ("flowbridge/workflows/runner.py", "flowbridge/workflows/boltzmann/pipeline.py"):
        assert name in text
        assert (root / name).is_file()
    pipeline = (root / "flowbridge/workflows/boltzmann/pipeline.py").read_text()
    assert "stages.append(" in pipeline
