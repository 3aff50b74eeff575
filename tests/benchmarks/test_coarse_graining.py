"""The science driver in its small size: everything runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, *parts: str) -> str:
    command = [sys.executable, "-m", "benchmarks.science.coarse_graining", "--small", "--folder", str(folder)]
    done = subprocess.run(
        [*command, *(word for part in parts for word in ("--part", part))],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_small(tmp_path):
    shown = run(tmp_path, "alanine", "speed")
    assert "flow_matching, 200 frames" in shown
    assert "beads, add_potential" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    cells = results["alanine"]["cells"]
    names = ("force_matching", "flow_matching", "flow_matching_with_contrast", "histogram", "prior")
    assert set(cells) == {f"{name} 200 0" for name in names}
    assert all(0.0 < one["mean_square_error"] < 50.0 for one in cells.values())
    assert (tmp_path / "alanine" / "alanine_learning_curves.png").is_file()
