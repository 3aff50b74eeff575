"""The comparison of ways to find molecules, in its small size."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("tblite", reason="tblite is not installed: pip install 'flowbridge[molecules]'")
from benchmarks import harness
from benchmarks.science import larger_molecules, molecules
from benchmarks.science.molecule_proposals import random_isomers, random_placement
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.workflows.molecules.building import load_builder


def test_small(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    molecules.main(["--small", "--seeds", "1", "--output", str(tmp_path / "runs")])
    results = json.loads((tmp_path / "molecules_small.json").read_text())
    (seed,) = results["results"].values()
    assert set(seed) == set(molecules.WAYS)
    for way in seed.values():
        for order in molecules.ORDERS:
            few, many = (way[order][budget]["C2H6O"] for budget in ("30", "60"))
            assert many["enumerated"] == 2
            assert not many["not_enumerated"]
            assert few["evaluations"] <= many["evaluations"]
            assert many["relaxed"] <= 2 * molecules.SMALL.starts
            assert many["valid"] == many["relaxed"]
    assert seed[molecules.ALL]["ranked"]["60"]["C2H6O"]["rank"] == 1
    molecules.main(["--small", "--seeds", "1", "--output", str(tmp_path / "runs")])  # from what was kept
    assert json.loads((tmp_path / "molecules_small.json").read_text())["results"] == results["results"]


def test_larger_molecules_small(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    larger_molecules.main(["--small", "--output", str(tmp_path / "runs")])
    results = json.loads((tmp_path / "larger_molecules_small.json").read_text())
    assert [point["rounds"] for point in results["points"]] == [0, 1]
    assert (tmp_path / "runs/larger_molecules_small/larger_molecules.png").stat().st_size > 10_000


def test_energies_are_compared_within_a_formula():
    first = larger_molecules.RelaxedMolecules(
        0, [True, True, False], [-10.0, -20.0, float("nan")], ["CH4", "C2H6", "CH4"]
    )
    second = larger_molecules.RelaxedMolecules(1, [True, True, True], [-11.0, -18.0, -10.5], ["CH4", "C2H6", "CH4"])
    before, after = larger_molecules.above_lowest([first, second])
    assert before.tolist() == pytest.approx([1.0 / 5, 0.0])
    assert after.tolist() == pytest.approx([0.0, 2.0 / 8, 0.5 / 5])


@pytest.mark.parametrize("way", [random_placement, random_isomers])
def test_simpler_ways_keep_the_formula(way):
    formula = Formula.parse("C4H8O2")
    for numbers, positions in itertools.islice(way(formula, 3), 10):
        assert Formula.of_atomic_numbers(numbers) == formula
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + np.eye(len(positions))
        assert distances.min() > 0.06
    if way is random_isomers:
        assert find_bonds(numbers, positions).fault is None


def test_nothing_held_out_was_taught():
    _, shipped = load_builder(None)
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import CalcMolFormula

    taught = {Formula.parse(CalcMolFormula(Chem.MolFromSmiles(smiles))) for smiles in shipped.smiles}
    held_out = {Formula.parse(text) for text in molecules.HELD_OUT}
    assert not taught & held_out
    assert not {Formula.parse(text) for text in molecules.PRACTICE} & held_out
