"""The search among built molecules: what costs no evaluation, what is relaxed, and in which order."""

import itertools
from collections import Counter

import numpy as np
import pytest

from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.graph_features import graph_features
from flowbridge.flows.molecules.training.evaluation import Evaluation
from flowbridge.flows.molecules.training.isomer_energies import IsomerEnergies

pytest.importorskip("rdkit")
from flowbridge.integrations.rdkit.isomers import enumerate_isomers
from flowbridge.integrations.rdkit.molecular_graphs import canonical_smiles, embed, relax_mmff
from flowbridge.workflows.molecules.novelty import Taught, fingerprint, same_geometry
from flowbridge.workflows.molecules.results import IsomerResults
from flowbridge.workflows.molecules.search import Candidates, Search, Start, minima, relaxed_start

FORMULA = Formula.parse("C4H8O")


class Counted:
    """A evaluator that leaves molecules as they are; energies are by SMILES, two evaluations each."""

    def __init__(self, energies):
        self.energies, self.asked = energies, []

    def __call__(self, molecules):
        verdicts = []
        for numbers, positions in molecules:
            smiles = canonical_smiles(numbers, find_bonds(numbers, positions).bonds)
            self.asked.append(smiles)
            verdicts.append(Evaluation(self.energies[smiles], np.asarray(positions), 2))
        return verdicts


@pytest.fixture(scope="module")
def molecules():
    return {smiles: embed(smiles, 1) for smiles in enumerate_isomers(FORMULA)}


@pytest.fixture(scope="module")
def energies(molecules):
    """Energies that double bonds lower and rings raise."""
    values = {}
    for index, (smiles, (numbers, positions)) in enumerate(molecules.items()):
        features = graph_features(numbers, find_bonds(numbers, positions).bonds)
        values[smiles] = features["ring 3"] + features["ring 4"] - features["atom O="] + 0.01 * (index * 7 % 26)
    return values


def test_what_is_seen_without_energies_costs_none(molecules, energies):
    candidates = Candidates()
    first, second = list(molecules.values())[:2]
    broken = (first.numbers, first.positions * 2.0)
    candidates.add([first, broken, first, second])
    assert (candidates.built, candidates.valid, len(candidates.isomers)) == (4, 3, 2)
    assert candidates.faults == {"the atoms fall apart into several molecules": 1}
    evaluator = Counted(energies)
    search = Search(FORMULA, evaluator, IsomerResults())
    assert list(search.run(candidates)) == [2, 4]
    assert evaluator.asked == list(molecules)[:2]
    search.count_builds(candidates)
    assert [search.found.isomers[smiles].times for smiles in evaluator.asked] == [2, 1]


def test_the_budget_ends_it(molecules, energies):
    candidates = Candidates()
    candidates.add(molecules.values())
    search = Search(FORMULA, Counted(energies), IsomerResults())
    assert list(search.run(candidates, evaluations=5)) == [2, 4, 6]
    assert list(search.run(candidates, evaluations=7, portion=2)) == [10]


def test_low_ones_come_first_when_energies_are_known_of_other_formulas(molecules, energies):
    others = [
        (Formula.parse(text), smiles)
        for text in ("C3H6O", "C5H10O")
        for smiles in enumerate_isomers(Formula.parse(text))
    ]
    structures = [embed(smiles, 1) for _, smiles in others]
    graphs = [graph_features(numbers, find_bonds(numbers, positions).bonds) for numbers, positions in structures]
    taught = [float(graph["ring 3"] + graph["ring 4"] - graph["atom O="]) for graph in graphs]
    model = IsomerEnergies.fit([formula for formula, _ in others], graphs, taught)
    candidates = Candidates()
    candidates.add(molecules.values())
    evaluator = Counted(energies)
    list(Search(FORMULA, evaluator, IsomerResults(), model).run(candidates, evaluations=12))
    asked = [energies[smiles] for smiles in evaluator.asked]
    assert max(asked) < np.median(list(energies.values()))
    assert min(energies, key=energies.get) in evaluator.asked


def test_every_isomer_once_before_any_again(molecules, energies):
    candidates = Candidates()
    few = ["C=CCCO", "CCCC=O", "CCC(C)=O"]
    candidates.add(molecules[smiles] for smiles in few)
    candidates.add(embed("CCCC=O", seed) for seed in range(2, 12))
    asked = {}
    for starts in (1, 2):
        evaluator = Counted(energies)
        list(Search(FORMULA, evaluator, IsomerResults(), starts=starts).run(candidates))
        asked[starts] = evaluator.asked
    assert asked == {1: few, 2: [*few, "CCCC=O"]}


def test_the_lowest_geometry_of_an_isomer_goes_first_and_each_minimum_once(molecules):
    starts = []
    for seed in range(8):
        numbers, positions = embed("CCCC=O", seed)
        starts.append(Start(numbers, positions, find_bonds(numbers, positions).bonds))
    energies = sorted(relaxed_start(start).energy for start in starts)
    turned = []
    for numbers, positions, _ in starts:
        bonds = find_bonds(numbers[::-1], positions[::-1]).bonds
        turned.append(Start(numbers[::-1], positions[::-1], bonds))
    found = []
    for numbers, positions in minima([*starts, *turned]):
        bonds = find_bonds(numbers, positions).bonds
        assert canonical_smiles(numbers, bonds) == "CCCC=O"
        found.append(relax_mmff(numbers, bonds, positions).energy)
    assert found[0] == pytest.approx(energies[0], abs=0.05)
    assert all(later > before + 0.05 for before, later in itertools.pairwise(found))
    assert 1 < len(found) < 8


def test_other_geometries_of_the_lowest_come_when_none_is_expected_below(molecules, energies):
    """A model that knows nothing but the level expects every isomer at the mean of what has been seen."""
    model = IsomerEnergies.fit([FORMULA], [Counter()], [0.0])
    candidates = Candidates()
    few = ["C=CCCO", "CCCC=O", "CCC(C)=O"]
    candidates.add(molecules[smiles] for smiles in few)
    candidates.add(embed("CCCC=O", seed) for seed in range(2, 12))
    evaluator = Counted({**dict.fromkeys(few, 5.0), "CCCC=O": -3.0})
    list(Search(FORMULA, evaluator, IsomerResults(), model, starts=2).run(candidates))
    assert sorted(evaluator.asked) == sorted([*few, "CCCC=O"])
    first, second = (index for index, smiles in enumerate(evaluator.asked) if smiles == "CCCC=O")
    assert second == first + 1


def test_what_another_relaxed_to_is_not_relaxed(molecules):
    aim, other = [smiles for smiles in molecules if (molecules[smiles].numbers == molecules["CCCC=O"].numbers).all()][
        :2
    ]

    def evaluator(asked):
        return [Evaluation(-1.0, np.asarray(molecules[aim].positions), 3) for _ in asked]

    candidates = Candidates()
    candidates.add([molecules[other], molecules[aim]])
    found = IsomerResults()
    assert list(Search(FORMULA, evaluator, found).run(candidates)) == [3]
    assert list(found.isomers) == [aim]


def test_starts_are_minima_of_mmff_with_the_bonds_that_were_built(molecules):
    numbers, positions = molecules["CCCC=O"]
    bonds = find_bonds(numbers, positions).bonds
    shaken = positions + np.random.default_rng(3).normal(0.0, 0.004, positions.shape)
    assert find_bonds(numbers, shaken).bonds == bonds
    relaxed = relaxed_start(Start(numbers, shaken, bonds)).positions
    lengths = [np.linalg.norm([places[i] - places[j] for i, j, _ in bonds], axis=1) for places in (positions, relaxed)]
    assert np.abs(lengths[0] - lengths[1]).max() < 1e-3
    assert find_bonds(numbers, relaxed).bonds == bonds


class TestNovelty:
    def test_turned_mirrored_renumbered(self, molecules):
        numbers, positions = molecules["CCCC=O"]
        turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
        order = np.random.default_rng(2).permutation(len(numbers))
        moved = ((positions @ turn.T + 1.0) * [1.0, 1.0, -1.0])[order]
        assert fingerprint(numbers[order], moved) == pytest.approx(fingerprint(numbers, positions))

    def test_isomers_differ(self, molecules):
        prints = [fingerprint(*molecule) for molecule in molecules.values()]
        assert not any(same_geometry(a, b) for k, a in enumerate(prints) for b in prints[:k])

    def test_conformers_differ_and_survive_the_file(self, molecules):
        numbers, positions = molecules["CCCC=O"]
        taught = Taught.of([("CCCC=O", numbers, positions)])
        again = Taught.from_provenance(taught.provenance())
        assert again.smiles == {"CCCC=O"}
        assert again.has_geometry(numbers, positions + 1e-5)
        others = [embed("CCCC=O", seed) for seed in range(2, 12)]
        assert not all(again.has_geometry(*other) for other in others)
        assert not Taught.from_provenance({}).has_geometry(numbers, positions)
