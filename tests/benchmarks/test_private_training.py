"""The benchmark of private training, in its small size: it runs, keeps its work, and says what it should say."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")


@pytest.mark.parametrize("part", ["digits", "audit"])
def test_small_size(part, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(importlib.import_module("benchmarks.harness"), "RESULTS", tmp_path)
    science = importlib.import_module("benchmarks.science.private_training")
    science.main([part, "--small", "--output", str(tmp_path / "runs")])
    assert (tmp_path / f"private_training_{part}_small.json").is_file()
    assert "DP-MAC" in capsys.readouterr().out
    science.main([part, "--small", "--output", str(tmp_path / "runs"), "--minutes", "0"])
    assert "minutes are over" not in capsys.readouterr().out  # all of it was kept
