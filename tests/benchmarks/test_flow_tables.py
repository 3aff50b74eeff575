"""The tables of stochastic flows and rank-one layers, in a size of seconds: they run, and say what they should say."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")


@pytest.fixture
def science(monkeypatch, tmp_path):
    """Function: name of a module of ``benchmarks.science`` to the module; results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one costs more than it brings
    monkeypatch.setattr(importlib.import_module("benchmarks.harness"), "RESULTS", tmp_path / "results")
    yield lambda name: importlib.import_module(f"benchmarks.science.{name}")
    torch.set_num_threads(before)


def test_double_well(science, tmp_path, capsys):
    table = science("stochastic_flows")
    results = table.double_well(tmp_path, 1, ("NSF + MC",), small=True)
    assert "NSF + MC" in capsys.readouterr().out
    (run,) = results["NSF + MC"]
    assert all(math.isfinite(run[which]["total"]) for which in ("plain", "reweighted"))
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({**run, "effective_sample_percent": 12.5}))
    again = table.double_well(tmp_path, 1, ("NSF + MC",), small=True)
    assert again["NSF + MC"][0]["effective_sample_percent"] == 12.5  # read, not computed again


def test_errors_of_free_energies_vanish_for_exact_samples(science):
    """Samples of the exact density have no error beyond counting; half the density on one side is seen as what it is."""
    wells = science("double_well")
    points = torch.linspace(-2.5, 2.5, 40_001, dtype=torch.float64)
    density = torch.exp(-wells.double_well(torch.stack([points, torch.zeros_like(points)], 1)))

    class Exact:
        tilt = torch.ones_like(points)

        def sample(self, count, generator):
            chosen = torch.multinomial(density * self.tilt, count, replacement=True, generator=generator)
            value = torch.stack([points[chosen], torch.zeros(count, dtype=torch.float64)], 1).float()
            return wells.StochasticFlow(wells.StandardNormal(2), wells.double_well, [])(value, generator)._replace(
                value=value, log_weights=-self.tilt[chosen].log()
            )

    exact = wells.evaluate(Exact(), 0, repeats=3, samples=100_000)
    assert exact.plain.bias < 0.2
    tilted = Exact()
    tilted.tilt = torch.where(points > 0.0, 1.0, math.e)
    biased = wells.evaluate(tilted, 0, repeats=3, samples=100_000)
    assert biased.plain.bias == pytest.approx(
        0.5, abs=0.1
    )  # one kT between the halves: half a kT either side of the mean
    assert biased.reweighted.bias < 0.2


def test_accuracy_and_regression(science, tmp_path, capsys):
    table = science("invertible_linear_layers")
    found = table.accuracy(tmp_path, 60, (8,))
    assert found["8"]["residual"] < 1e-10
    assert found["8"]["log_det"] < 1e-10
    assert set(table.regression(3, 20)) >= {"1 P4, det > 0", "-1 LU"}
    assert "det of the target" in capsys.readouterr().out


def test_parametrisations_know_their_determinants(science):
    kinds = science("linear_parametrisations")
    for make in kinds.PARAMETRISATIONS.values():
        model = make(5)
        step = kinds.training_step(model)
        for _ in range(12):
            step()
        determinant = torch.linalg.slogdet(model.dense().double())[1]
        assert float(model.log_abs_det().detach()) == pytest.approx(float(determinant), abs=1e-4)


def test_images(science, tmp_path):
    images = science("image_densities")
    energy = images.ImageEnergy(images.rings_image())
    points = energy.sample(20_000, torch.Generator().manual_seed(0))
    dark = float((energy(points) > -math.log(0.1)).float().mean())
    assert 0.0 < dark < 0.2
    far = torch.tensor([[images.EXTENT + 1.0, 0.0], [images.EXTENT + 2.0, 0.0]])
    assert float(energy(far)[1]) > float(energy(far)[0]) > 10.0
    assert images.text_image("flow").max() > 0.9
    assert images.text_image("flow").mean() < 0.5
