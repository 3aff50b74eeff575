"""The command that makes the tables, in its small size."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_all_stages_and_again(tmp_path):
    """The second call finds everything done, and gives the same numbers."""
    command = [
        sys.executable, "-m", "benchmarks.science.equivariant_flows", "--small", "--systems", "DW4", "--output", str(tmp_path),
    ]  # fmt: skip
    shown = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    first, second = (json.loads(text) for text in shown)
    flow = first["flows"]["DW4"]
    assert flow["equivariance"]["float32"] < 1e-5
    assert flow["equivariance"]["float64"] < 1e-10
    assert math.isfinite(flow["nll"])
    assert 0.0 < flow["effective_sample_percent"] <= 100.0
    rows = {(row["field"], row["training"]): row for row in first["baselines"]}
    for name in ("graph", "kernel"):
        assert rows[name, "one"]["moved"] == pytest.approx(rows[name, "one"]["same"], abs=1e-4)
    assert abs(rows["network", "one"]["moved"] - rows["network", "one"]["same"]) > 1e-3
    assert first == second
