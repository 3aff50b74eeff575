"""Imitation and reinforcement of small builders: they learn what they should, and go on after a stop to the same numbers."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.configuration import BuilderConfiguration
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.molecule_sets import MoleculeSet
from flowbridge.flows.molecules.training.evaluation import Evaluation
from flowbridge.flows.molecules.training.imitation import ImitationStage, imitate, imitation_terms
from flowbridge.flows.molecules.training.reinforcement import (
    Choices,
    References,
    Reinforcement,
    ReinforcementStage,
    Visits,
    advantages,
    choices_log_probs,
    clipped_objective,
    reward,
)

SMALL = BuilderConfiguration(width=16, layers=1, radial=8, channels=4, components=3, torsions=12, seed=1)
HYDROGEN_FLUORIDE = Formula.parse("HF")


def water(angle=104.5, length=0.096):
    half = math.radians(angle) / 2
    arms = length * np.array([[math.sin(half), math.cos(half), 0], [-math.sin(half), math.cos(half), 0]])
    return np.array([8, 1, 1]), np.vstack([np.zeros(3), arms])


def short_bonds(molecules):
    """A evaluator that likes the two atoms 0.12 nm apart, and fails where they are closer than 0.08 nm."""
    verdicts = []
    for _, positions in molecules:
        length = float(np.linalg.norm(positions[1] - positions[0]))
        failed = length < 0.08
        energy = None if failed else 2000.0 * (length - 0.12) ** 2
        verdicts.append(Evaluation(energy, np.asarray(positions), 1, "too close" if failed else None))
    return verdicts


@pytest.fixture(scope="module")
def waters() -> MoleculeSet:
    return MoleculeSet.of([water(104.5 + d, 0.096 + 0.0001 * d) for d in (-1, 0, 1)])


class TestImitation:
    STAGE = ImitationStage(steps=120, batch=32, learning_rate=1e-2, average=0.9)

    def test_samples_look_like_what_was_imitated(self, waters, tmp_path):
        model = MoleculeBuilder(SMALL)
        curve = imitate(model, waters, self.STAGE, tmp_path, seed=3)
        assert curve[-1]["nll"] < curve[0]["nll"] - 2.0
        built = model.sample("H2O", 200, torch.Generator().manual_seed(1))
        arms = built.positions[:, 1:] - built.positions[:, :1]
        lengths = arms.norm(dim=-1)
        angles = torch.rad2deg(torch.acos((arms[:, 0] * arms[:, 1]).sum(-1) / lengths.prod(-1)))
        assert float(lengths.median()) == pytest.approx(0.096, abs=0.003)
        assert float(angles.median()) == pytest.approx(104.5, abs=6.0)

    def test_weights_choose_what_is_imitated(self, tmp_path):
        model = MoleculeBuilder(SMALL)
        short, long = (np.array([[0, 0, 0], [0, 0, length]]) for length in (0.09, 0.13))
        molecules = MoleculeSet.of([([9, 1], short), ([9, 1], long)])
        imitate(model, molecules, self.STAGE, tmp_path, weights=torch.tensor([0.0, 1.0]), seed=3)
        lengths = model.sample("HF", 50, torch.Generator().manual_seed(1)).positions[:, 1].norm(dim=-1)
        assert float(lengths.quantile(0.1)) > 0.12
        for weights in (torch.zeros(2), torch.ones(3), torch.tensor([-1.0, 2.0])):
            with pytest.raises(ConfigurationError, match="weights must be 2 numbers"):
                imitate(model, molecules, self.STAGE, tmp_path, weights=weights)

    def test_a_stopped_training_goes_on_to_the_same(self, waters, tmp_path):
        stage = self.STAGE.model_copy(update={"steps": 12})
        whole, halves = MoleculeBuilder(SMALL), MoleculeBuilder(SMALL)
        imitate(whole, waters, stage, tmp_path / "whole", seed=3, checkpoint_interval=6)

        class Stopped(Exception):
            pass

        def stop_at_ninth(*_):
            nonlocal calls
            calls += 1
            if calls == 9:
                raise Stopped

        calls = 0
        handle = halves.network.first.register_forward_pre_hook(stop_at_ninth)
        with pytest.raises(Stopped):
            imitate(halves, waters, stage, tmp_path / "halves", seed=3, checkpoint_interval=1)
        handle.remove()
        again = MoleculeBuilder(SMALL)
        imitate(again, waters, stage, tmp_path / "halves", seed=3, checkpoint_interval=6)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name

    def test_terms_are_those_of_the_density(self):
        """With one atom to attach to, imitation's terms are the density along the order."""
        model = MoleculeBuilder(SMALL).double()
        generator = torch.Generator().manual_seed(1)
        lengths = [0.09, 0.1, 0.13]
        molecules = MoleculeSet.of([([9, 1], [[0.0, 0.0, 0.0], [0.0, length, 0.0]]) for length in lengths])
        with torch.no_grad():
            terms = sum(imitation_terms(model, molecules, torch.full((3,), s), generator).sum(0) for s in (0, 1))
            expected = model.log_prob(molecules) + 2.0 * torch.tensor(lengths, dtype=torch.float64).log()
        assert torch.allclose(terms, expected)


class TestRewards:
    def test_energies_below_and_faults(self):
        model = MoleculeBuilder(SMALL)
        built = model.sample("HF", 4, torch.Generator().manual_seed(1))
        lengths = torch.tensor([0.12, 0.13, 0.07, 0.16])
        positions = torch.zeros(4, 2, 3, dtype=torch.float64)
        positions[:, 1, 2] = lengths
        references = References()
        worth = reward(built._replace(positions=positions), [HYDROGEN_FLUORIDE] * 4, short_bonds, references, 0.5)
        # 0.13 and 0.16 nm are no bond of H and F
        assert worth.valid.tolist() == [False, False, False, False]
        positions[:, 1, 2] = torch.tensor([0.10, 0.105, 0.07, 0.16])
        worth = reward(built._replace(positions=positions), [HYDROGEN_FLUORIDE] * 4, short_bonds, references, 0.5)
        best, second = 2000 * 0.015**2, 2000 * 0.02**2
        assert worth.valid.tolist() == [True, True, False, False]
        assert worth.values.tolist() == pytest.approx([math.exp((best - second) / 0.5), 1.0, 0.0, 0.0])
        assert references.energies == {"FH": pytest.approx(best)}

    def test_the_first_of_a_kind_is_worth_more(self):
        model = MoleculeBuilder(SMALL)
        built = model.sample("HF", 4, torch.Generator().manual_seed(1))
        positions = torch.zeros(4, 2, 3, dtype=torch.float64)
        positions[:, 1, 2] = torch.tensor([0.1, 0.1, 0.5, 0.1])
        visits = Visits(0.5, {})
        formulas = [HYDROGEN_FLUORIDE] * 4
        built = built._replace(positions=positions)
        worth = reward(built, formulas, short_bonds, References(), 0.5, visits)
        assert worth.values.tolist() == pytest.approx([1.5, 1 + 0.5 / 2**0.5, 0.0, 1 + 0.5 / 3**0.5])
        again = reward(built, formulas, short_bonds, References(), 0.5, Visits(0.5, dict(visits.counts)))
        assert again.values[0] == pytest.approx(1 + 0.5 / 4**0.5)
        assert list(visits.counts.values()) == [3]

    def test_advantages_compare_within_a_formula(self):
        water_formula = Formula.parse("H2O")
        values = advantages(torch.tensor([0.0, 1.0, 10.0, 10.0]), [HYDROGEN_FLUORIDE] * 2 + [water_formula] * 2)
        assert values[2:].tolist() == [0.0, 0.0]
        assert values[0] == -values[1] < 0

    def test_the_trust_region_ends_the_gain(self):
        ratio = torch.tensor([0.5, 0.9, 1.5, 0.5, 1.5], requires_grad=True)
        gain = clipped_objective(ratio, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]), 0.2)
        assert gain.tolist() == pytest.approx([0.5, 0.9, 1.2, -0.8, -1.5])
        gain.sum().backward()
        assert ratio.grad.tolist() == [1.0, 1.0, 0.0, 0.0, -1.0]


class TestReinforcement:
    STAGE = ReinforcementStage(iterations=25, molecules=64, learning_rate=3e-3, energy_scale=0.3, imitation=0.0)

    def test_rewards_rise(self):
        model = MoleculeBuilder(SMALL)
        curve = Reinforcement(model, [HYDROGEN_FLUORIDE], short_bonds, self.STAGE, seed=2).run()
        early = np.mean([r.reward for r in curve[:4]])
        late = np.mean([r.reward for r in curve[-4:]])
        assert late > early + 0.15
        assert np.mean([r.valid for r in curve[-4:]]) > np.mean([r.valid for r in curve[:4]])

    def test_the_penalty_holds_it_near_what_it_imitated(self):
        divergences = []
        for weight in (0.0, 3.0):
            stage = self.STAGE.model_copy(update={"iterations": 10, "imitation": weight})
            curve = Reinforcement(MoleculeBuilder(SMALL), [HYDROGEN_FLUORIDE], short_bonds, stage, seed=2).run()
            divergences.append(abs(curve[-1].divergence))
        assert divergences[1] < divergences[0]

    def test_a_stopped_training_goes_on_to_the_same(self, tmp_path):
        stage = self.STAGE.model_copy(update={"iterations": 4, "molecules": 16, "novelty": 0.5})
        formulas = [HYDROGEN_FLUORIDE, Formula.parse("H2O")]

        def evaluator(molecules):
            return short_bonds(molecules)

        whole = MoleculeBuilder(SMALL)
        curve = Reinforcement(whole, formulas, evaluator, stage, seed=5).run()

        rounds = Reinforcement(MoleculeBuilder(SMALL), formulas, evaluator, stage, seed=5).rounds(
            tmp_path / "checkpoint"
        )
        assert [next(rounds), next(rounds)] == curve[:2]
        rounds.close()
        again = MoleculeBuilder(SMALL)
        assert Reinforcement(again, formulas, evaluator, stage, seed=5).run(tmp_path / "checkpoint") == curve
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name

    def test_log_probabilities_are_those_of_building(self):
        model = MoleculeBuilder(SMALL).double()
        formulas = [Formula.parse(text) for text in ("CH4O", "H2O", "C2H4")]
        built = model.sample(formulas, 3, torch.Generator().manual_seed(4))
        choices = Choices.of(built)
        assert len(choices.steps) == int(built.counts.sum())
        with torch.no_grad():
            assert torch.allclose(choices_log_probs(model, built, choices), choices.log_probs, rtol=0, atol=1e-7)

    def test_settings_that_cannot_be_used(self):
        with pytest.raises(ConfigurationError, match="at least one formula"):
            Reinforcement(MoleculeBuilder(SMALL), [], short_bonds, self.STAGE)
        with pytest.raises(ConfigurationError, match="two molecules of each"):
            Reinforcement(MoleculeBuilder(SMALL), [HYDROGEN_FLUORIDE] * 3, short_bonds, ReinforcementStage(molecules=5))
