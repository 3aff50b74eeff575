"""Parts of graphs and the energies that are guessed from them."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files.files import load, save
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.configuration import BuilderConfiguration
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.graph_features import graph_features, graph_key
from flowbridge.flows.molecules.training.isomer_energies import IsomerEnergies

pytest.importorskip("rdkit")
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.integrations.rdkit.isomers import enumerate_isomers
from flowbridge.integrations.rdkit.molecular_graphs import embed

SMALL = BuilderConfiguration(width=16, layers=1, radial=8, channels=4, components=3, torsions=12, seed=1)


def graph(smiles):
    numbers, positions = embed(smiles, 1)
    return numbers, find_bonds(numbers, positions).bonds


@pytest.fixture(scope="module")
def isomers():
    formulas = [Formula.parse(text) for text in ("C4H8O", "C4H6O", "C4H10O", "C3H6O", "C5H8", "C3H7NO")]
    return [(formula, graph(smiles)) for formula in formulas for smiles in enumerate_isomers(formula)[::2]]


class TestFeatures:
    def test_cyclobutene(self):
        features = graph_features(*graph("C1=CCC1"))
        assert features["atom C="] == features["atom C"] == 2
        assert features["ring 4"] == features["ring 4 with 1 more bonds"] == features["bond 2 of C=,C="] == 1
        assert features["chain 1-2-1"] == 1  # a ring of four closes on itself: one for each bond
        assert features["angle C,C= at C"] == 4

    def test_shared_atoms_of_rings(self):
        assert graph_features(*graph("C1CC2CC12"))["rings 3 and 4 share 2 atoms"] == 1
        assert graph_features(*graph("C1CC12CC2"))["rings 3 and 3 share 1 atoms"] == 1

    def test_no_numbering_changes_them(self, isomers):
        generator = np.random.default_rng(1)
        for _, (numbers, bonds) in isomers[::7]:
            order = generator.permutation(len(numbers))
            place = np.argsort(order)
            renumbered = [(*sorted((int(place[i]), int(place[j]))), order_) for i, j, order_ in bonds]
            assert graph_features(numbers[order], renumbered) == graph_features(numbers, bonds)

    def test_keys_tell_isomers_apart(self, isomers):
        keys = {(formula, graph_key(*each)) for formula, each in isomers}
        assert len(keys) >= 0.97 * len(isomers)


class TestEnergies:
    @pytest.fixture
    def truth(self, isomers):
        """Energies that are sums of parts that several formulas have, with noise of 0.05 eV."""
        generator = np.random.default_rng(2)
        graphs = [graph_features(*each) for _, each in isomers]
        formulas_of = defaultdict(set)
        for (formula, _), each in zip(isomers, graphs, strict=True):
            for name in each:
                formulas_of[name].add(formula)
        weights = {
            name: generator.normal(0.0, 0.4) if len(formulas_of[name]) > 2 else 0.0 for name in sorted(formulas_of)
        }
        energies = [
            -100.0 * formula.heavy_atoms
            + sum(weights[name] * n for name, n in each.items())
            + generator.normal(0, 0.05)
            for (formula, _), each in zip(isomers, graphs, strict=True)
        ]
        return [formula for formula, _ in isomers], graphs, energies

    def test_a_formula_that_was_left_out(self, truth):
        formulas, graphs, energies = truth
        held_out = Formula.parse("C4H6O")
        rest = [index for index, formula in enumerate(formulas) if formula != held_out]
        own = [index for index, formula in enumerate(formulas) if formula == held_out]
        model = IsomerEnergies.fit(*([values[index] for index in rest] for values in truth))
        actual = np.array([energies[index] for index in own])
        guess = model.guess(held_out, [graphs[index] for index in own])
        relative = guess.mean.numpy() - guess.mean.mean().item()
        assert np.corrcoef(relative, actual - actual.mean())[0, 1] > 0.8
        # Half of the energies make the other half better known, and known energies are (nearly) kept.
        known = [energy if place % 2 else None for place, energy in enumerate(actual)]
        better = model.guess(held_out, [graphs[index] for index in own], known)
        assert np.abs(better.mean.numpy() - actual)[::2].mean() < np.abs(guess.mean.numpy() - actual)[::2].mean()
        assert (better.covariance.diagonal() < guess.covariance.diagonal()).all()
        assert np.abs(better.mean.numpy() - actual)[1::2].max() < 0.3

    def test_errors_are_as_large_as_they_are_said_to_be(self, truth):
        """Nine in ten of the deviations from guesses with half of the energies known are within two deviations."""
        formulas, graphs, energies = truth
        deviations = []
        for held_out in dict.fromkeys(formulas):
            rest = [index for index, formula in enumerate(formulas) if formula != held_out]
            own = [index for index, formula in enumerate(formulas) if formula == held_out]
            model = IsomerEnergies.fit(*([values[index] for index in rest] for values in truth))
            known = [energies[index] if place % 2 else None for place, index in enumerate(own)]
            guess = model.guess(held_out, [graphs[index] for index in own], known)
            actual = torch.tensor([energies[index] for index in own], dtype=torch.float64)
            deviations.append(((guess.mean - actual) / guess.covariance.diagonal().sqrt())[::2])
        inside = (torch.cat(deviations).abs() < 2.0).double().mean()
        assert inside >= 0.9

    def test_it_is_as_regression_says(self, truth):
        """Guesses with nothing known are those of the ridge regression with the noise that was found."""
        formulas, graphs, energies = truth
        model = IsomerEnergies.fit(*truth)
        counts = torch.tensor([formula.counts for formula in formulas], dtype=torch.float64)
        target = torch.tensor(energies, dtype=torch.float64) - counts @ model.elements
        design = model.design(graphs)
        penalty = model.noise / 0.5**2 * torch.eye(design.shape[1])
        weights = torch.linalg.solve(design.T @ design + penalty, design.T @ target)
        assert torch.allclose(design @ weights, design @ model.weights, atol=2e-3)

    def test_a_builder_carries_them_in_its_file(self, truth, tmp_path):
        builder = MoleculeBuilder(SMALL)
        assert builder.energies is None
        builder.carry(IsomerEnergies.fit(*truth))
        save(builder, tmp_path / "builder.flow")
        again = load(tmp_path / "builder.flow")
        formula, features = truth[0][0], truth[1][:5]
        before, after = builder.energies.guess(formula, features), again.energies.guess(formula, features)
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.covariance, after.covariance)

    def test_bad_input(self):
        with pytest.raises(ConfigurationError, match="as many of each"):
            IsomerEnergies.fit([], [], [])
