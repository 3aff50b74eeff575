"""Private means, deviations and principal axes: their sensitivity, and how close they come."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.private.budget import PrivacyBudget, noise_multiplier, spent
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.feed_forward import FeedForwardConfiguration, FeedForwardNetwork
from flowbridge.forcefields.private.statistics import private_moments, private_principal_axes
from flowbridge.forcefields.private.training import train_privately
from flowbridge.forcefields.private.units import UnitData

COVARIANCE = torch.diag(torch.tensor([4.0, 1.0, 0.04, 0.04]))


def elongated(count=4000, seed=0) -> UnitData:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator) @ COVARIANCE.sqrt() + torch.tensor([1.0, 0.0, 0.0, -1.0])
    return UnitData(inputs, torch.zeros(count))


def test_moments_come_close():
    data = elongated()
    found = private_moments(data, torch.zeros(4), 12.0, 2.0, seed=0)
    assert torch.allclose(found.mean, data.inputs.mean(0).double(), atol=0.05)
    assert torch.allclose(found.deviation[:2], data.inputs.std(0)[:2].double(), rtol=0.1)
    assert found.release.sampling_rate == 1.0


def test_noise_of_the_moments_covers_any_unit():
    """With next to no noise, the sums move by no more than the norm when a unit is added, however far off it is."""
    base = elongated(50)
    for far in (1e-3, 1.0, 1e6):
        more = UnitData(torch.cat([base.inputs, torch.full((1, 4), far)]), torch.zeros(51))
        sums = []
        for data in (base, more):
            found = private_moments(data, torch.zeros(4), 3.0, 1e-12, seed=0)
            mean = found.mean / 3.0
            second = (found.deviation / 3.0).square() + mean.square()
            sums.append(data.units * torch.cat([mean, second]))
        assert (sums[1] - sums[0]).norm() <= found.release.clipping["norm"] + 1e-6


def test_axes_come_close_and_noise_has_the_size_it_should():
    data = elongated()
    centre = data.inputs.mean(0)
    found = private_principal_axes(data, 2, 5.0, centre=centre, seed=0)
    assert torch.allclose(found.axes.T @ found.axes, torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert abs(float(found.axes[0, 0])) > 0.99
    lost = private_principal_axes(data, 1, 1e6, centre=centre, seed=0)  # drowned
    assert abs(float(lost.axes[0, 0])) < 0.99


@pytest.mark.parametrize("far", [1e-3, 1e6])
def test_noise_of_the_axes_covers_any_unit(far, monkeypatch):
    """Adding a trajectory, however long and far off, moves the matrix by a Frobenius norm of one at most."""
    matrices = []
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (matrices.append(a), (None, torch.eye(len(a))))[1])
    base = elongated(60)
    owners = torch.arange(60) // 3
    more = torch.cat([base.inputs, far * torch.randn(30, 4, generator=torch.Generator().manual_seed(1))])
    longer = torch.cat([owners, torch.full((30,), 20)])
    for inputs, numbers in ((base.inputs, owners), (more, longer)):
        private_principal_axes(UnitData(inputs, torch.zeros(len(inputs)), numbers, "trajectory"), 2, 1e-12, seed=0)
    assert 0.4 < float((matrices[1] - matrices[0]).norm()) <= 1.0 + 1e-9


def test_units_of_many_samples_count_once():
    data = elongated(200)
    owners = torch.cat([torch.zeros(101), torch.arange(1, 100)])
    grouped = UnitData(data.inputs, data.targets, owners, "trajectory")
    assert grouped.units == 100
    found = private_moments(grouped, torch.zeros(4), 20.0, 1e-12, seed=0)
    expected = torch.cat([data.inputs[:101].mean(0)[None], data.inputs[101:]]).mean(0)
    assert torch.allclose(found.mean, expected.double(), atol=1e-5)


def test_statistics_and_training_share_one_bill():
    """Means, axes and training within a budget: three releases, none free, and less for the training than it had alone."""
    data = UnitData(elongated().inputs, (elongated().inputs[:, 0] > 1.0).long())
    moments = private_moments(data, torch.zeros(4), 12.0, 20.0, seed=0)
    axes = private_principal_axes(data, 2, 20.0, centre=moments.mean, seed=0)
    model = FeedForwardNetwork(FeedForwardConfiguration(inputs=4, widths=(2, 2)))
    model.standardise(moments.mean.float(), axes.axes.float())
    budget = PrivacyBudget(epsilon=2.0, delta=1e-4, accountant="rdp")
    settings = PrivateTraining(method="dp_mac", steps=5, batch=400)
    alone = noise_multiplier(budget, 0.1, 5)
    ledger = train_privately(model, data, budget, settings, before=[moments.release, axes.release], seed=0).ledger
    assert [release.mechanism for release in ledger.releases] == [
        "means and second moments",
        "principal axes",
        "dp_mac",
    ]
    assert ledger.releases[2].noise_multiplier > alone
    assert spent(ledger.releases[2:], 1e-4, "add_remove", "rdp") < ledger.epsilon <= 2.0


def test_bad_input():
    with pytest.raises(ConfigurationError, match="noise_multiplier must be positive"):
        private_moments(elongated(20), torch.zeros(4), 1.0, 0.0)
    with pytest.raises(ConfigurationError, match="radius must be positive"):
        private_moments(elongated(20), torch.zeros(3), 1.0, 1.0)
    with pytest.raises(ConfigurationError, match="axes must be from 1 to the 4 inputs"):
        private_principal_axes(elongated(20), 5, 1.0)
