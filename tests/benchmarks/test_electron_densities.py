"""The benchmark of electron densities in its small size, from the case to the table and the picture."""

import pytest
import torch

pyscf = pytest.importorskip("pyscf")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(), pyscf.lib.num_threads()
    torch.set_num_threads(1)
    pyscf.lib.num_threads(1)
    yield
    torch.set_num_threads(before[0])
    pyscf.lib.num_threads(before[1])


def test_a_case_is_measured_kept_and_printed(tmp_path, monkeypatch, capsys):
    from benchmarks.science import electron_densities

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(electron_densities, "RESULTS", tmp_path)
    monkeypatch.setattr(electron_densities, "FILE", tmp_path / "electron_densities.json")
    result = electron_densities.CASES["H2"](True)
    energy, error = result["energy"]
    assert energy == pytest.approx(-1.17, abs=5 * error + 0.01)
    assert result["second_moment_fci"] == pytest.approx(6.08, abs=0.1)
    assert result["quadrupole_fci"] == pytest.approx(0.457, abs=0.05)
    electron_densities.store("H2", result)
    assert electron_densities.stored()["H2"]["energy"] == list(result["energy"])
    electron_densities.print_table(electron_densities.stored())
    assert f"{energy:.4f}" in capsys.readouterr().out


def test_the_dissociation_is_drawn(tmp_path):
    from benchmarks.science.dissociation_figure import draw_dissociation

    points = [
        {"length": x, "energy": [-8.0, 0.01], "dipole": [-2.0, 0.1], "energy_ccsd_t": -8.0, "dipole_ccsd": -2.0}
        for x in (3.0, 4.0)
    ]
    draw_dissociation(points, tmp_path / "images" / "curve.png")
    assert (tmp_path / "images" / "curve.png").read_bytes().startswith(b"\x89PNG")
