"""The table of rigid-body flows, in its small size."""

import json

import pytest

pytest.importorskip("genice2", reason="GenIce2 is not installed: pip install 'flowbridge[flow-families]'")
from benchmarks import harness
from benchmarks.science import rigid_body_flows
from benchmarks.science.tetrahedral_body import BODIES


def test_small(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rigid_body_flows.main(["--small", "--output", str(tmp_path / "runs")])
    files = sorted(file.name for file in tmp_path.glob("*.json"))
    assert files == [
        f"rigid_body_flows_{name}_small.json" for name in ("ice", "tetrahedron", "trained_ice", "uneven_tetrahedron")
    ]
    ice = json.loads((tmp_path / "rigid_body_flows_trained_ice_small.json").read_text())["temperatures"]["100"]
    contraction = ice["maps"]["harmonic contraction"]
    assert contraction["both_directions"]["value"] / 16 == pytest.approx(-41.863, abs=0.05)
    assert ice["mbar"]["value"] == pytest.approx(-41.863, abs=0.15)  # a tenth of a picosecond a temperature


def test_weights_of_the_modes_by_quadrature():
    even, uneven = (body.exact()[0] for body in BODIES.values())
    assert even == pytest.approx([0.25] * 4, abs=1e-6)
    assert uneven.sum() == pytest.approx(1.0)
    assert uneven[3] > 1.5 * uneven[0]
