"""Both methods: gradients against autograd and opacus, training, ledgers, refusals, resumption."""

import json

import pytest
import torch
from opacus import GradSampleModule
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError, ModelFileError
from flowbridge.core.evaluator import Evaluator
from flowbridge.core.model_files.files import from_bytes, load, read_header, save, to_bytes
from flowbridge.core.training.trainer import Trainer
from flowbridge.forcefields.private.budget import PrivacyBudget, Release, spent
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.auxiliary_coordinates import AuxiliaryCoordinates
from flowbridge.forcefields.private.learning.feed_forward import (
    FeedForwardConfiguration,
    FeedForwardNetwork,
    activate,
    task_losses,
)
from flowbridge.forcefields.private.learning.sample_gradients import SampleGradients
from flowbridge.forcefields.private.ledger import ledger_of
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.training import PrivateObjective, train_privately
from flowbridge.forcefields.private.units import UnitData

BUDGET = PrivacyBudget(epsilon=4.0, delta=1e-4, accountant="rdp")
QUICK = PrivateTraining(steps=6, batch=40, learning_rate=0.05)


def network(task="classification", activation="tanh", widths=(5, 7, 6, 3), seed=0) -> FeedForwardNetwork:
    settings = FeedForwardConfiguration(inputs=widths[0], widths=widths, activation=activation, task=task, seed=seed)
    return FeedForwardNetwork(settings)


def clusters(count=400, seed=0, unit="frame", owners=None) -> UnitData:
    """Three classes around the corners of a triangle."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    inputs = 0.4 * torch.randn(count, 5, generator=generator)
    inputs[torch.arange(count), targets] += 1.5
    return UnitData(inputs, targets, owners, unit)


def accuracy(model: FeedForwardNetwork, data: UnitData) -> float:
    return float((model.predict(data.inputs).argmax(1) == data.targets).float().mean())


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
def test_coefficients_are_derivatives_of_the_local_objectives(task, activation):
    model = network(task, activation).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (8,), generator=generator)
    if task == "regression":
        targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    learner = AuxiliaryCoordinates(model, 1, 20, 0.02)
    batch = UnitData(inputs, targets).batch(torch.arange(8))
    found = learner.contributions(batch, [1e9] * 3)
    with torch.no_grad():
        states = learner._coordinates(inputs, targets)
    loss = task_losses(model.dense_layers[-1](states[-1]), targets, task).sum()
    for k, layer in enumerate(model.dense_layers[:-1]):
        loss = loss + (states[k + 1] - activate(layer(states[k]), activation)).square().sum()
    loss.backward()
    for layer, total in zip(model.dense_layers, found.sums, strict=True):
        assert torch.allclose(total[:, :-1], layer.weight.grad, atol=1e-10)
        assert torch.allclose(total[:, -1], layer.bias.grad, atol=1e-10)


def test_coordinates_lower_the_objective_and_keep_samples_apart():
    model, data = network(), clusters(20)
    learner = AuxiliaryCoordinates(model, 1, 40, 0.02)
    with torch.no_grad():
        together = learner._coordinates(data.inputs, data.targets)
        alone = learner._coordinates(data.inputs[:1], data.targets[:1])
        start = AuxiliaryCoordinates(model, 1, 0, 0.02)._coordinates(data.inputs, data.targets)

    def objective(states):
        parts = [
            (z - torch.tanh(layer(x))).square().sum()
            for layer, x, z in zip(model.dense_layers[:-1], states[:-1], states[1:], strict=True)
        ]
        return sum(parts) + task_losses(model.dense_layers[-1](states[-1]), data.targets, "classification").sum()

    assert objective(together) < 0.95 * objective(start)
    assert all(torch.allclose(a, b[:1], atol=1e-6) for a, b in zip(alone, together, strict=True))


def test_curvatures_of_a_linear_network_are_exact():
    """One layer and a regression: the diagonal of the second derivative, by autograd."""
    model = network("regression", widths=(4, 2)).double()
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = UnitData(inputs, torch.zeros(6, 2, dtype=torch.float64)).batch(torch.arange(6))
    curvature = AuxiliaryCoordinates(model, 2, 0, 0.1).contributions(batch, [1e9, 1e9]).sums[1]

    def loss(weight):
        return task_losses(inputs @ weight.T, torch.zeros(6, 2), "regression").sum()

    exact = torch.autograd.functional.hessian(loss, model.dense_layers[0].weight.detach())
    assert torch.allclose(curvature[:, :-1], torch.einsum("ijij->ij", exact))
    assert torch.allclose(curvature[:, -1], torch.full((2,), 6.0, dtype=torch.float64))


def test_sample_gradients_agree_with_opacus():
    """Sum of clipped gradients, against per-sample gradients of opacus' hooks."""
    model, data = network(), clusters(12)
    found = SampleGradients.of_network(model).contributions(data.batch(torch.arange(12)), [2.2])
    plain = torch.nn.Sequential(*[m for layer in model.dense_layers for m in (layer, torch.nn.Tanh())][:-1])
    wrapped = GradSampleModule(plain, loss_reduction="sum")
    torch.nn.functional.cross_entropy(wrapped(data.inputs), data.targets, reduction="sum").backward()
    rows = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], dim=1)
    norms = rows.norm(dim=1)
    assert 0 < int((norms <= 2.2).sum()) < 12
    expected = (rows * (2.2 / norms).clamp_max(1.0)[:, None]).sum(0)
    assert torch.allclose(found.sums[0], expected, atol=1e-5)
    assert int(found.within[0]) == int((norms <= 2.2).sum())


@pytest.mark.parametrize("owners", [None, torch.arange(400) // 4])
@pytest.mark.parametrize(
    "settings",
    [
        PrivateTraining(method="dp_mac", batch=1, steps=1),
        PrivateTraining(method="dp_mac", batch=1, steps=1, order=2, clip=(1.0,) * 6),
        PrivateTraining(method="dp_sgd", batch=1, steps=1),
    ],
)
def test_a_batch_that_drew_nobody_contributes_nothing(settings, owners):
    data = clusters(owners=owners)
    training = PrivateObjective(network(), data, BUDGET, settings, None, (), SeededNoise(0))
    found = training.learner.contributions(data.batch(torch.arange(0)), training.thresholds)
    assert all(torch.equal(total, torch.zeros_like(total)) for total in found.sums)
    some = training.learner.contributions(data.batch(torch.arange(3)), training.thresholds)
    assert [total.shape for total in found.sums] == [total.shape for total in some.sums]
    assert (int(found.within.sum()), found.non_finite) == (0, 0)


@pytest.mark.parametrize("method", ["dp_mac", "dp_sgd"])
def test_a_unit_of_many_samples_counts_once(method):
    """A trajectory repeated ten times contributes what one frame would, and never more than the norm."""
    model = network()
    one = clusters(1)
    many = UnitData(one.inputs.expand(10, -1), one.targets.expand(10), torch.zeros(10), "trajectory")
    settings = PrivateTraining(method=method, batch=1, steps=1)
    learners = [PrivateObjective(model, d, BUDGET, settings, None, (), SeededNoise(0)).learner for d in (one, many)]
    sums = [
        learner.contributions(data.batch(torch.tensor([0])), [1e-2] * len(learner.blocks)).sums
        for learner, data in zip(learners, (one, many), strict=True)
    ]
    for a, b in zip(*sums, strict=True):
        assert a.norm() == pytest.approx(1e-2, rel=1e-4)
        assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        PrivateTraining(method="dp_mac", steps=40, batch=100, learning_rate=0.05),
        PrivateTraining(method="dp_mac", steps=40, batch=100, learning_rate=0.05, order=2, clip=(1.0, 1.0, 3.0, 3.0)),
        PrivateTraining(method="dp_sgd", steps=40, batch=100, learning_rate=0.05, average=0.9),
        PrivateTraining(method="dp_sgd", steps=40, batch=100, learning_rate=0.05, clip=0.05, adaptive_quantile=0.6),
    ],
)
def test_networks_learn_within_their_budget(settings):
    model = network(widths=(5, 8, 3))
    before = accuracy(model, clusters(500, 9))
    result = train_privately(model, clusters(), BUDGET, settings, seed=0)
    assert accuracy(model, clusters(500, 9)) > max(0.9, before + 0.1)
    assert 3.8 < result.ledger.epsilon <= 4.0
    assert result.non_finite == 0


def test_noise_is_really_there():
    """Nobody drawn: what moves the parameters is noise alone, of the size on the ledger."""
    model, seen = network(), []
    training = PrivateObjective(
        model, clusters(), BUDGET, QUICK, None, (), SeededNoise(0), lambda step, means: seen.append(means), 1e-9
    )
    for _ in Trainer(training).steps():
        pass
    size = training.multiplier * QUICK.clip / QUICK.batch
    assert seen[0][0].std() == pytest.approx(size, rel=0.2)
    assert training.result().smallest_batch == 0


def test_cryptographic_noise_differs_from_run_to_run():
    models = [network(), network()]
    ledgers = [train_privately(model, clusters(), BUDGET, QUICK).ledger for model in models]
    assert all(ledger.noise == "cryptographic" for ledger in ledgers)
    assert not torch.equal(models[0].dense_layers[0].weight, models[1].dense_layers[0].weight)


def test_the_bill_travels_with_the_model(tmp_path):
    model = network()
    before = Release(mechanism="means", noise_multiplier=20.0, sampling_rate=1.0, steps=1, noise="cryptographic")
    ledger = train_privately(model, clusters(), BUDGET, QUICK, before=[before], seed=1).ledger
    assert ledger.releases[0] == before
    assert ledger.epsilon == spent(ledger.releases, BUDGET.delta, "add_remove", "rdp") <= 4.0
    save(model, tmp_path / "model.flow", provenance={"data": "clusters"})
    stored = read_header(tmp_path / "model.flow").provenance
    assert stored["data"] == "clusters"
    assert stored["privacy"]["epsilon"] == ledger.epsilon
    assert "seed" in stored["privacy"]["guarantee"]
    copies = load(tmp_path / "model.flow"), from_bytes(to_bytes(model))
    assert all(ledger_of(copy) == ledger for copy in copies)
    assert torch.equal(copies[0].predict(clusters().inputs), model.predict(clusters().inputs))
    shown = " ".join(CliRunner().invoke(application, ["info", str(tmp_path / "model.flow")]).stdout.split())
    for part in (
        "chosen or tuned on the same data",
        "statistics for standardising",
        "example frames",
        "losses, accuracies",
    ):
        assert part in shown  # what no ledger covers is said with it
    for part in ("Privacy", "add_remove", "noise_multiplier 20", "dp_sgd", "cryptographic", f"{ledger.epsilon:.6g}"):
        assert part in shown
    content = json.loads(CliRunner().invoke(application, ["info", str(tmp_path / "model.flow"), "--json"]).stdout)
    assert content["provenance"]["privacy"]["releases"][1]["steps"] == QUICK.steps


def test_further_training_adds_to_the_bill_or_is_refused(tmp_path):
    model = network()
    first = train_privately(model, clusters(), BUDGET, QUICK, seed=1).ledger
    save(model, tmp_path / "model.flow")
    model = load(tmp_path / "model.flow")
    with pytest.raises(ConfigurationError, match=r"is used up|no noise keeps"):
        train_privately(model, clusters(), BUDGET.model_copy(update={"epsilon": 3.9}), QUICK, seed=2)
    assert ledger_of(model) == first
    larger = BUDGET.model_copy(update={"epsilon": 6.0})
    second = train_privately(model, clusters(), larger, QUICK, seed=2).ledger
    assert second.releases[0] == first.releases[0]
    assert len(second.releases) == 2
    assert first.epsilon < second.epsilon <= 6.0
    with pytest.raises(ConfigurationError, match="a ledger for each frame under add_remove"):
        train_privately(model, clusters(unit="trajectory"), larger, QUICK, seed=2)
    with pytest.raises(ConfigurationError, match="under replace neighbours"):
        train_privately(model, clusters(), larger.model_copy(update={"neighbours": "replace"}), QUICK)


def test_a_bill_does_not_cover_what_came_later(tmp_path):
    model = network()
    ledger = train_privately(model, clusters(), BUDGET, QUICK, seed=1).ledger
    with torch.no_grad():
        model.dense_layers[0].weight.mul_(1.1)
    with pytest.raises(ModelFileError, match="changed after the private training"):
        save(model, tmp_path / "model.flow")
    ledger.attach(model)
    save(model, tmp_path / "model.flow")
    with pytest.raises(ModelFileError, match="not what this model was trained with"):
        save(model, tmp_path / "other.flow", provenance={"privacy": {"epsilon": 0.1}})


def test_training_resumes_to_the_same_model(tmp_path):
    settings = QUICK.model_copy(update={"average": 0.5, "adaptive_quantile": 0.5, "method": "dp_mac"})
    whole, resumed = network(), network()
    ledger = train_privately(whole, clusters(), BUDGET, settings, seed=3).ledger
    file = tmp_path / "training.checkpoint"
    trainer = Trainer(PrivateObjective(resumed, clusters(), BUDGET, settings, None, (), SeededNoise(3)))
    for _ in range(4):
        trainer.advance()
    trainer.save(file)
    resumed = network()
    for other in (
        {"budget": BUDGET.model_copy(update={"epsilon": 8.0})},
        {"settings": settings.model_copy(update={"clip": 2.0})},
        {"seed": 4},
        {"seed": None},
    ):
        asked = {"budget": BUDGET, "settings": settings, "seed": 3} | other
        with pytest.raises(ConfigurationError, match="another guarantee"):
            train_privately(
                network(), clusters(), asked["budget"], asked["settings"], seed=asked["seed"], checkpoint=file
            )
    assert train_privately(resumed, clusters(), BUDGET, settings, seed=3, checkpoint=file).ledger == ledger
    assert not file.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_contributions_that_are_not_finite_are_reported():
    data = clusters()
    data.inputs[5] = 3.4e38  # finite, and more than the first layer can bear
    result = train_privately(network(activation="relu"), data, BUDGET, QUICK.model_copy(update={"batch": 400}), seed=0)
    assert result.non_finite == QUICK.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 500}, "batches of 500 units cannot be drawn from 400"),
        ({"clip": (1.0, 2.0)}, "clip has 2 norms for the 1 blocks"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        train_privately(network(), clusters(), BUDGET, QUICK.model_copy(update=changes))


def test_bad_models_and_data():
    with pytest.raises(ConfigurationError, match=r"layers that mix samples .*: 1 \(BatchNorm1d\)"):
        SampleGradients(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)), lambda p, x, y: x.sum())
    with pytest.raises(ConfigurationError, match="the network takes"):
        train_privately(network(widths=(4, 3)), clusters(), BUDGET, QUICK)
    with pytest.raises(ConfigurationError, match="class numbers"):
        train_privately(network(widths=(5, 2)), clusters(), BUDGET, QUICK)
    with pytest.raises(ConfigurationError, match="no guarantee for 400 units"):
        train_privately(network(), clusters(), PrivacyBudget(epsilon=1.0, delta=0.0025), QUICK)
    with pytest.raises(ConfigurationError, match=r"must be a flowbridge Potential .*, not .*FeedForwardNetwork"):
        Evaluator.of(network())
