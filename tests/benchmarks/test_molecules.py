"""The comparison of ways to find molecules, in its small size."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("tblite", reason="tblite is not installed: pip install 'flowbridge[molecules]'")
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.formulas import Formula

from benchmarks import harness
from benchmarks.science import molecules
from benchmarks.science.molecule_proposals import random_isomers, random_placement
from flowbridge.molecule_building import load_builder


def test_small(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    molecules.main(["--small", "--output", str(tmp_path / "runs")])
    results = json.loads((tmp_path / "molecules_small.json").read_text())
    assert set(results["ways"]) == set(molecules.WAYS)
    for way in results["ways"].values():
        assert way["C2H6O"]["enumerated"] == 2
        assert not way["C2H6O"]["not_enumerated"]
    assert results["ways"]["RDKit's random isomers"]["C2H6O"]["valid"] > 0
    molecules.main(["--small", "--output", str(tmp_path / "runs")])  # from what was kept
    assert json.loads((tmp_path / "molecules_small.json").read_text())["ways"] == results["ways"]


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
    _, known = load_builder(None)
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import CalcMolFormula

    taught = {Formula.parse(CalcMolFormula(Chem.MolFromSmiles(smiles))) for smiles in known}
    held_out = {Formula.parse(text) for text in molecules.HELD_OUT}
    assert not taught & held_out
    assert not {Formula.parse(text) for text in molecules.PRACTICE} & held_out
