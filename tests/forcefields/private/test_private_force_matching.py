"""A force field of beads with a trajectory as the unit: gradients, training, and what its file holds."""

import pytest
import torch
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files import load, save
from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.batched_dynamics import LangevinReplicas
from flowbridge.forcefields.networks import InvariantConfiguration
from flowbridge.forcefields.prior_terms import HarmonicAngles, HarmonicBonds, PriorEnergy
from flowbridge.forcefields.private.bill import bill_of
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.force_matching import (
    force_matching_gradients,
    public_force_field,
    trajectory_units,
)
from flowbridge.forcefields.private.training import PrivateTraining, train_privately
from flowbridge.forcefields.training.fitting import BeadFrames
from flowbridge.forcefields.training.gradients import network_force_gradients

BEADS = Particles(("CA",) * 4, (0,) * 4, (50.0,) * 4, ((0, 1), (1, 2), (2, 3)))
START = torch.tensor([[0.0, 0.0, 0.0], [0.38, 0.0, 0.0], [0.5, 0.36, 0.0], [0.88, 0.36, 0.1]])
NETWORK = InvariantConfiguration(width=16, depth=1, lipschitz=None)
TRAJECTORIES = 200


def energy(angle: float, stiffness: float) -> PriorEnergy:
    bonds = HarmonicBonds(list(BEADS.bonds), lengths=[0.38] * 3, stiffness=[5e3] * 3)
    angles = HarmonicAngles([(0, 1, 2), (1, 2, 3)], centres=[angle] * 2, stiffness=[stiffness] * 2)
    return PriorEnergy(BEADS, [bonds, angles], 300.0)


@pytest.fixture(scope="module")
def frames() -> tuple[BeadFrames, torch.Tensor]:
    """Trajectories of a chain whose angles are not those of the public prior, and their numbers."""
    truth = energy(2.3, 60.0)
    starts = START.double().expand(TRAJECTORIES, -1, -1).clone()
    replicas = LangevinReplicas(truth, starts, 300.0, step_ps=0.005, friction_per_ps=5.0, seed=3)
    replicas.step(200)
    positions = torch.from_numpy(replicas.run(4, 50)).double()
    owners = torch.arange(TRAJECTORIES).expand(4, -1).reshape(-1)
    positions = positions.reshape(-1, 4, 3)
    return BeadFrames(positions, truth.energy_and_forces(positions).forces), owners


def error(force_field, frames) -> float:
    found = force_field.energy_and_forces(frames.positions).forces
    return float((found - frames.forces).square().mean().sqrt()) / thermal_energy(300.0)


def test_gradients_are_those_of_force_matching(frames):
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1).double()
    data = trajectory_units(force_field, frames[0], frames[1])
    batch = data.batch(torch.arange(data.units))
    found = force_matching_gradients(force_field).contributions(batch, [1e12]).sums[0] / data.units
    _, *expected = network_force_gradients(force_field.network, batch.inputs, batch.targets)
    assert torch.allclose(found, torch.cat([g.flatten() for g in expected]), rtol=1e-8, atol=1e-8)


def test_a_force_field_learns_without_keeping_frames(frames, tmp_path):
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    before = error(force_field, frames[0])
    data = trajectory_units(force_field, *frames, per_step=2)
    assert (data.units, data.unit) == (TRAJECTORIES, "trajectory")
    settings = PrivateTraining(steps=60, batch=100, clip=30.0, learning_rate=0.03, average=0.9)
    budget = PrivacyBudget(epsilon=20.0, delta=1e-3, accountant="rdp")
    bill = train_privately(
        force_field, data, budget, settings, learner=force_matching_gradients(force_field), seed=0
    ).bill
    assert error(force_field, frames[0]) < 0.8 * before
    assert bill.unit == "trajectory"
    # What the frames would have said lies in no buffer either: the public part is that of an untrained model.
    fresh = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(force_field.buffers(), fresh.buffers(), strict=True))
    gaps = torch.cdist(force_field.examples.flatten(1), frames[0].positions.flatten(1))
    assert float(gaps.min()) > 1e-3
    save(force_field, tmp_path / "chain.flow")
    assert bill_of(load(tmp_path / "chain.flow")) == bill


def test_bad_input(frames):
    with pytest.raises(ConfigurationError, match="set lipschitz = None"):
        public_force_field(energy(1.9, 20.0), InvariantConfiguration(), START, seed=1)
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    with pytest.raises(ConfigurationError, match="with forces and without weights"):
        trajectory_units(force_field, BeadFrames(frames[0].positions), frames[1])
    data = trajectory_units(force_field, *frames)
    with pytest.raises(ConfigurationError, match="needs a learner"):
        train_privately(force_field, data, PrivacyBudget(epsilon=1.0, delta=1e-3), PrivateTraining(batch=10))
