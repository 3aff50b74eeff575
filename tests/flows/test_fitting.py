"""Training as users run it: it learns, it repeats itself, and a killed run goes on to the same numbers."""

import copy
import json

import numpy as np
import pytest
import torch

from flowbridge.core.energy import PotentialEnergy
from flowbridge.core.errors import ConfigurationError, ConvergenceError, NonFiniteEnergyError
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training.configuration import TrainingConfiguration
from flowbridge.flows.boltzmann.training.fitting import TrainingData, train
from flowbridge.flows.boltzmann.training.modules import LikelihoodTraining, RefinementTraining
from flowbridge.flows.transforms.rank_one_matrix import rank_one_matrices
from flowbridge.testing.conformance import check_potential

SMILES = "CO"
FLOW = FlowConfiguration.model_validate(
    {"torsions": {"couplings": 2, "components": 6, "hidden": [16]}, "stiff": {"couplings": 4, "hidden": [16]}}
)
MIXED = FLOW.model_copy(update={"stiff": FLOW.stiff.model_copy(update={"mixing": "rank_one"})})
SETTINGS = TrainingConfiguration.model_validate(
    {
        "likelihood": {"steps": 24, "batch": 64, "learning_rate": 3e-3, "average": 0.9},
        "refinement": {"steps": 24, "batch": 64, "average": 0.9},
        "checkpoint_interval": 8,
        "log_interval": 5,
    }
)


@pytest.fixture(scope="module")
def springs(from_smiles, springs_of):
    return springs_of(*from_smiles(SMILES))


@pytest.fixture(scope="module")
def data(from_smiles, frames_of, springs) -> TrainingData:
    positions = torch.as_tensor(frames_of(*from_smiles(SMILES), 600))
    return TrainingData(positions, *springs.energy_and_forces(positions))


@pytest.fixture
def model(from_smiles, data) -> BoltzmannGenerator:
    return BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)


class Killed(Exception):
    """Stands in for the end of the process."""


def kill_after(monkeypatch, stage: type, steps: int) -> None:
    """Let the stage's step number ``steps`` (counted in this process) die before it is taken."""
    loss, calls = stage.loss, iter(range(steps))

    def mortal(self, generator):
        if next(calls, None) is None:
            raise Killed
        return loss(self, generator)

    monkeypatch.setattr(stage, "loss", mortal)


def run(model, data, springs, folder, seed=1, settings=SETTINGS):
    return train(model, data, PotentialEnergy(springs), settings, folder, seed, show_progress=False)


@pytest.fixture(scope="module")
def undisturbed(from_smiles, data, springs, tmp_path_factory):
    model = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
    result = run(model, data, springs, tmp_path_factory.mktemp("undisturbed"))
    return model, result


def require_same(first, second) -> None:
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_training_learns(undisturbed, from_smiles, data, springs):
    model, result = undisturbed
    fresh = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
    likelihood, refinement = result.curves["likelihood"], result.curves["refinement"]
    assert [point["step"] for point in likelihood] == [0, 5, 10, 15, 20]
    assert [point["step"] for point in refinement] == [0, 5, 10, 15, 20]
    assert bool(model.log_prob(data.positions).mean() > fresh.log_prob(data.positions).mean())
    # minus the reverse Kullback-Leibler divergence, up to the constant log Z
    before, after = (flow.sample(4000, springs, seed=3).log_weights.mean() for flow in (fresh, model))
    assert after > before + 0.5
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_the_same_seed_gives_the_same_model_and_another_seed_another(undisturbed, model, data, springs, tmp_path):
    other = copy.deepcopy(model)
    result = run(model, data, springs, tmp_path / "same")
    require_same(model, undisturbed[0])
    assert result == undisturbed[1]
    run(other, data, springs, tmp_path / "other", seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stage", "steps"),
    [
        (LikelihoodTraining, 4),  # before the first checkpoint
        (LikelihoodTraining, 8),  # at one
        (LikelihoodTraining, 17),
        (RefinementTraining, 0),
        (RefinementTraining, 23),
    ],
)
def test_a_killed_run_goes_on_to_the_same_numbers(
    undisturbed, from_smiles, model, data, springs, tmp_path, stage, steps
):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, stage, steps)
        with pytest.raises(Killed):
            run(model, data, springs, tmp_path)
    again = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
    result = run(again, data, springs, tmp_path)
    require_same(again, undisturbed[0])
    assert result == undisturbed[1]


def test_a_finished_run_is_not_run_again(undisturbed, from_smiles, model, data, springs, tmp_path):
    run(model, data, springs, tmp_path)
    again = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, LikelihoodTraining, 0)
        kill_after(patch, RefinementTraining, 0)
        result = run(again, data, springs, tmp_path)
    require_same(again, undisturbed[0])
    assert result == undisturbed[1]


@pytest.mark.parametrize(
    "change",
    [
        {"likelihood": {"steps": 4, "batch": 16, "force_weight": 0.1}, "refinement": {"steps": 0}},
        {
            "likelihood": {"steps": 4, "batch": 16},
            "refinement": {"steps": 4, "batch": 16, "path_weight": 0, "reverse_kl_weight": 1, "likelihood_weight": 1},
        },
        {"likelihood": {"steps": 4, "batch": 16}, "refinement": {"steps": 8, "batch": 16, "final_batch": 32}},
        {"likelihood": {"steps": 0}, "refinement": {"steps": 3, "batch": 16, "coverage": 0}},
    ],
    ids=["force matching", "reverse kl and likelihood", "larger batches at the end", "refinement alone"],
)
def test_every_objective_trains(model, data, springs, tmp_path, change):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = run(model, data, springs, tmp_path, settings=TrainingConfiguration.model_validate(change))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(np.isfinite(v) for curve in result.curves.values() for point in curve for v in point.values())


class Hopeless:
    """An energy that has a value for one configuration in three."""

    def __init__(self, springs, share: int) -> None:
        self.energy, self.share = PotentialEnergy(springs), share

    def energies_and_forces(self, positions):
        energies, forces = self.energy.energies_and_forces(positions)
        lost = np.arange(len(energies)) % 3 < self.share
        energies[lost], forces[lost] = np.nan, np.nan
        return energies, forces


def test_samples_without_energies_stop_the_training_when_they_are_most(model, data, springs, tmp_path):
    with pytest.raises(NonFiniteEnergyError, match=r"only \d+ of \d+ samples of the flow have a finite energy"):
        train(model, data, Hopeless(springs, 2), SETTINGS, tmp_path, 1, show_progress=False)


def test_samples_without_energies_are_left_out_when_they_are_few(model, data, springs, tmp_path):
    settings = SETTINGS.model_copy(update={"likelihood": SETTINGS.likelihood.model_copy(update={"steps": 5})})
    train(model, data, Hopeless(springs, 1), settings, tmp_path, 1, show_progress=False)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_frames_and_forces_must_belong_together(data):
    with pytest.raises(ConfigurationError, match="do not belong together"):
        TrainingData(data.positions, data.energies[:-1], data.forces)
    with pytest.raises(ConfigurationError, match="do not belong together"):
        TrainingData(data.positions, data.energies, data.forces[:, :-1])


class TestHeldOutFrames:
    """Forty frames, a large flow: over-training within a hundred steps."""

    SETTINGS = TrainingConfiguration.model_validate(
        {
            "likelihood": {"steps": 300, "batch": 64, "learning_rate": 1e-2, "average": 0.5, "patience": 3},
            "refinement": {"steps": 0},
            "checkpoint_interval": 10,
            "log_interval": 5,
        }
    )

    def few(self, data):
        return TrainingData(data.positions[:40], data.energies[:40], data.forces[:40])

    def run(self, model, data, springs, folder):
        energy = PotentialEnergy(springs)
        held_out = data.positions[200:]
        return train(model, self.few(data), energy, self.SETTINGS, folder, 1, show_progress=False, held_out=held_out)

    def test_training_stops_and_keeps_the_best(self, model, data, springs, tmp_path):
        result = self.run(model, data, springs, tmp_path)
        seen = [(p["step"], p["held_out_nll"]) for p in result.curves["likelihood"] if "held_out_nll" in p]
        best = min(range(len(seen)), key=lambda index: seen[index][1])
        assert seen[-2][0] < 300.0  # it stopped
        assert best == len(seen) - 2 - 3
        kept = -model.flow.log_prob(coordinates_of(model, data.positions[200:])).double().mean().item()
        assert kept == pytest.approx(seen[best][1], rel=1e-6)

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_killed_run_goes_on_to_the_same_numbers(self, from_smiles, model, data, springs, tmp_path, moment):
        result = self.run(model, data, springs, tmp_path / "undisturbed")
        steps = int(result.curves["likelihood"][-1]["step"])
        again = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, LikelihoodTraining, steps - 7 if moment == "before" else steps - 1)
            with pytest.raises(Killed):
                self.run(again, data, springs, tmp_path / "killed")
        again = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), FLOW)
        other = self.run(again, data, springs, tmp_path / "killed")
        require_same(again, model)
        assert other == result

    def test_a_likelihood_that_is_not_finite_ends_the_training(self, model, data, springs, tmp_path):
        with torch.no_grad():
            for parameter in model.flow.parameters():
                parameter.fill_(torch.nan)
        with pytest.raises(ConvergenceError, match="step 0 of LikelihoodTraining is nan: lower learning_rate"):
            run(model, data, springs, tmp_path)


def test_a_gradient_that_is_not_finite_ends_the_training_before_it_spoils_the_model(model, data, springs, tmp_path):
    original = RefinementTraining.loss

    def spoilt(self, generator):
        return original(self, generator) * (torch.nan if self.step == 3 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefinementTraining, "loss", spoilt)
        with pytest.raises(ConvergenceError, match=r"gradient of step 3 of RefinementTraining is not finite.*diverged"):
            run(model, data, springs, tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in model.flow.parameters())


def coordinates_of(model, positions):
    coordinates, _ = model.coordinates.inverse(positions)
    return Coordinates(*(part.to(model.flow.dtype) for part in coordinates))


@pytest.fixture(scope="module")
def mixed(from_smiles, data, springs, tmp_path_factory):
    model = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, data.positions.numpy(), MIXED)
    run(model, data, springs, tmp_path_factory.mktemp("mixed"))
    return model


class TestMixingLayers:
    """Linear layers whose perturbations are merged every ten steps, between checkpoints that come every eight."""

    def test_they_are_trained_and_their_inverses_follow(self, mixed):
        matrices = rank_one_matrices(mixed.flow)
        assert len(matrices) == 3
        for matrix in matrices:
            dense = matrix.dense().detach()
            assert float((dense - torch.eye(len(dense))).abs().max()) > 1e-3
            assert int(matrix.merges) == 6  # two in each stage, and one at its end
            assert torch.allclose(matrix.log_abs_det().detach(), torch.linalg.slogdet(dense).logabsdet, atol=1e-5)
            assert torch.allclose(matrix.solve(dense.T).detach(), torch.eye(len(dense)), atol=1e-5)

    @pytest.mark.parametrize(
        ("stage", "steps"), [(LikelihoodTraining, 9), (LikelihoodTraining, 19), (RefinementTraining, 17)]
    )
    def test_a_killed_run_goes_on_within_a_cycle(self, mixed, from_smiles, data, springs, tmp_path, stage, steps):
        positions = data.positions.numpy()
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, stage, steps)
            with pytest.raises(Killed):
                run(
                    BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, positions, MIXED),
                    data,
                    springs,
                    tmp_path,
                )
        again = BoltzmannGenerator.untrained(from_smiles(SMILES)[0], 300.0, positions, MIXED)
        run(again, data, springs, tmp_path)
        require_same(again, mixed)

    def test_as_a_potential_and_from_its_file(self, mixed):
        check_potential(copy.deepcopy(mixed).double(), configurations=2)

    def test_where_they_make_no_sense(self):
        with pytest.raises(ValueError, match="mixing = 'rank_one' adds coordinates up: it needs map = 'whitened'"):
            FlowConfiguration.model_validate({"stiff": {"map": "interval", "transform": "bumps", "mixing": "rank_one"}})
        with pytest.raises(ValueError, match="angles may not know of bonds"):
            FlowConfiguration.model_validate({"stiff": {"split": "angles_then_bonds", "mixing": "rank_one"}})
