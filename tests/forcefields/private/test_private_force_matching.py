"""A force field of beads with a trajectory as the unit: gradients, training, and what its file holds."""

from functools import partial

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files.files import load, save
from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.batched_dynamics import LangevinReplicas
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.graph_network import GraphConfiguration
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.prior_terms import HarmonicAngles, HarmonicBonds, PriorEnergy
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.auxiliary_force_matching import AuxiliaryForceMatching
from flowbridge.forcefields.private.learning.force_matching import (
    force_matching_gradients,
    public_force_field,
    trajectory_units,
)
from flowbridge.forcefields.private.ledger import ledger_of
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.training import train_privately
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


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_coefficients_are_derivatives_of_the_local_objectives(frames, activation, residual):
    """E of the module's docstring, written out with the layers as they are, and differentiated by autograd."""
    shape = InvariantConfiguration(width=6, depth=2, lipschitz=None, activation=activation, residual=residual)
    force_field = public_force_field(energy(1.9, 20.0), shape, START, seed=1).double()
    network = force_field.network
    learner = AuxiliaryForceMatching(force_field, coordinate_steps=3, coordinate_rate=0.05)
    batch = trajectory_units(force_field, frames[0][:8], torch.arange(8)).batch(torch.arange(8))
    labels = learner.length * batch.targets.flatten(1)
    sums = learner.contributions(batch, [1e9] * 3).sums
    found = [total * 0.05**behind for total, behind in zip(sums, (2, 1, 0), strict=True)]

    def layer(number, state):
        """Values in column 0, slopes in the others, each by its definition."""
        linear = network.bounded_layers[number]
        drive = torch.nn.functional.linear(state[:, 0], linear.weight, linear.bias)
        values, slopes = torch.func.jvp(
            torch.func.vmap(network.activation, in_dims=1, out_dims=1),
            (drive[:, None].repeat(1, 12, 1),), (state[:, 1:] @ linear.weight.T,),
        )  # fmt: skip
        result = torch.cat([values[:, :1], slopes], dim=1)
        return result + state if residual and number else result

    def objective(states):
        parts = [(layer(k, states[k]) - states[k + 1]).square().sum() for k in range(2)]
        forces = (states[2][:, 1:] @ network.output.weight.T)[:, :, 0]
        return sum(parts) + 0.5 * (forces + labels).square().sum()

    with torch.no_grad():
        states = [learner._inputs(batch.inputs)]
        for number in range(2):
            states.append(layer(number, states[-1]))
    for _ in range(3):
        moved = [state.detach().requires_grad_(True) for state in states[1:]]
        slopes = torch.autograd.grad(objective([states[0], *moved]), moved)
        states = [states[0], *(z.detach() - 0.05 * slope for z, slope in zip(moved, slopes, strict=True))]
    expected = torch.autograd.grad(objective(states), learner.parameters)
    for number in range(2):
        assert torch.allclose(found[number][:, :-1], expected[2 * number], rtol=1e-8, atol=1e-10)
        assert torch.allclose(found[number][:, -1], expected[2 * number + 1], rtol=1e-8, atol=1e-10)
    assert torch.allclose(found[2], expected[4], rtol=1e-8, atol=1e-10)


def test_short_steps_teach_what_the_gradient_does(frames):
    """From a forward pass, one short step a hidden layer: every layer's coefficient points along the loss' gradient."""
    shape = InvariantConfiguration(width=6, depth=2, lipschitz=None)
    force_field = public_force_field(energy(1.9, 20.0), shape, START, seed=1).double()
    batch = trajectory_units(force_field, frames[0][:50], torch.arange(50)).batch(torch.arange(50))
    found = AuxiliaryForceMatching(force_field, coordinate_rate=1e-6).contributions(batch, [1e9] * 3).sums
    _, *gradients = network_force_gradients(force_field.network, batch.inputs, batch.targets)
    for coefficient, gradient in (
        (found[0][:, :-1], gradients[0]),
        (found[1][:, :-1], gradients[2]),
        (found[2], gradients[4]),
    ):
        assert (coefficient * gradient).sum() > (1.0 - 1e-6) * coefficient.norm() * gradient.norm()


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_curvatures_are_second_derivatives_where_nothing_is_missed(frames, activation):
    """Without steps on the coordinates hidden layers miss nothing, and Gauss-Newton is exact: autograd says the same."""
    shape = InvariantConfiguration(width=3, depth=1, lipschitz=None, activation=activation)
    force_field = public_force_field(energy(1.9, 20.0), shape, START, seed=1).double()
    learner = AuxiliaryForceMatching(force_field, coordinate_steps=0, order=2)
    batch = trajectory_units(force_field, frames[0][:4], torch.arange(4)).batch(torch.arange(4))
    found = learner.contributions(batch, [1e9] * 4).sums[2:]
    first, last = force_field.network.bounded_layers[0], force_field.network.output
    inputs = learner._inputs(batch.inputs)
    target = learner._predicted(inputs, 0)[0].detach()

    def missed(packed):
        drive = inputs @ packed[:, :-1].T
        values, slopes = torch.func.jvp(
            torch.func.vmap(force_field.network.activation, in_dims=1, out_dims=1),
            ((drive[:, :1] + packed[:, -1]).repeat(1, 12, 1),), (drive[:, 1:],),
        )  # fmt: skip
        return (torch.cat([values[:, :1], slopes], dim=1) - target).square().sum()

    packed = torch.cat([first.weight, first.bias[:, None]], dim=1).detach()
    exact = torch.autograd.functional.hessian(missed, packed)
    assert torch.allclose(found[0], torch.einsum("ijij->ij", exact), rtol=1e-8, atol=1e-10)

    def loss(weight):
        return 0.5 * (target[:, 1:] @ weight.T).square().sum()

    exact = torch.autograd.functional.hessian(loss, last.weight.detach())
    assert torch.allclose(found[1], torch.einsum("ijij->ij", exact), rtol=1e-8, atol=1e-10)


def test_no_trajectory_moves_a_block_by_more_than_its_norm(frames):
    """However large its forces are, and however many frames it has."""
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    loud = frames[0].forces * torch.logspace(-3, 4, len(frames[0]), dtype=torch.float64)[:, None, None]
    data = trajectory_units(force_field, BeadFrames(frames[0].positions, loud), torch.arange(len(loud)) // 40)
    learner, norms = AuxiliaryForceMatching(force_field), [0.1, 0.5]
    everyone = learner.contributions(data.batch(torch.arange(data.units)), norms)
    assert everyone.within.sum() < 2 * data.units
    for unit in range(0, data.units, 4):
        others = torch.tensor([n for n in range(data.units) if n != unit])
        without = learner.contributions(data.batch(others), norms).sums
        for total, rest, norm in zip(everyone.sums, without, norms, strict=True):
            assert (total - rest).norm() <= norm * (1.0 + 1e-4)


@pytest.mark.parametrize("per_step", [None, 2])
@pytest.mark.parametrize(
    ("network", "learner"),
    [
        (NETWORK, AuxiliaryForceMatching),
        (NETWORK, partial(AuxiliaryForceMatching, order=2)),
        (NETWORK, force_matching_gradients),
        (GraphConfiguration(width=6), force_matching_gradients),
    ],
)
def test_a_batch_that_drew_nobody_contributes_nothing(frames, network, learner, per_step):
    """Batches are random subsets, and the empty one is as good an answer as any: what failed on it would tell of it."""
    data = trajectory_units(public_force_field(energy(1.9, 20.0), network, START, seed=1), *frames, per_step=per_step)
    learner = learner(public_force_field(energy(1.9, 20.0), network, START, seed=1))
    norms = [1.0] * len(learner.blocks)
    noise = SeededNoise(0)
    some, none = (
        learner.contributions(data.batch(drawn, noise), norms) for drawn in (torch.arange(3), torch.arange(0))
    )
    assert [total.shape for total in none.sums] == [total.shape for total in some.sums]
    assert all(float(total.norm()) > 0.0 for total in some.sums)
    assert all(torch.equal(total, torch.zeros_like(total)) for total in none.sums)
    assert (none.within.tolist(), none.non_finite) == ([0] * len(norms), 0)


@pytest.mark.parametrize(("method", "clip"), [("dp_sgd", 30.0), ("dp_mac", 1.0)])
def test_a_force_field_learns_without_keeping_frames(frames, tmp_path, method, clip):
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    before = error(force_field, frames[0])
    data = trajectory_units(force_field, *frames, per_step=2)
    assert (data.units, data.unit) == (TRAJECTORIES, "trajectory")
    settings = PrivateTraining(method=method, steps=40, batch=100, clip=clip, learning_rate=0.03, average=0.9)
    budget = PrivacyBudget(epsilon=20.0, delta=1e-3, accountant="rdp")
    ledger = train_privately(force_field, data, budget, settings, seed=0).ledger
    assert error(force_field, frames[0]) < 0.8 * before
    assert (ledger.unit, ledger.releases[0].mechanism) == ("trajectory", method)
    # What the frames would have said lies in no buffer either: the public part is that of an untrained model.
    fresh = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(force_field.buffers(), fresh.buffers(), strict=True))
    gaps = torch.cdist(force_field.examples.flatten(1), frames[0].positions.flatten(1))
    assert float(gaps.min()) > 1e-3
    save(force_field, tmp_path / "chain.flow")
    assert ledger_of(load(tmp_path / "chain.flow")) == ledger


def test_bad_input(frames):
    with pytest.raises(ConfigurationError, match="set lipschitz = None"):
        public_force_field(energy(1.9, 20.0), InvariantConfiguration(), START, seed=1)
    force_field = public_force_field(energy(1.9, 20.0), NETWORK, START, seed=1)
    with pytest.raises(ConfigurationError, match="with forces and without weights"):
        trajectory_units(force_field, BeadFrames(frames[0].positions), frames[1])
    data = trajectory_units(force_field, *frames)
    budget, quick = PrivacyBudget(epsilon=9.0, delta=1e-3, accountant="rdp"), PrivateTraining(batch=10, steps=1)
    private = quick.model_copy(update={"method": "dp_mac"})
    with pytest.raises(ConfigurationError, match="say dp_mac, but the learner trains by dp_sgd"):
        train_privately(force_field, data, budget, private, learner=force_matching_gradients(force_field))
    second = train_privately(force_field, data, budget, private.model_copy(update={"order": 2}), seed=0).ledger
    assert list(second.releases[0].clipping) == ["layer 1", "layer 2", "layer 1 curvature", "layer 2 curvature"]
    graph = CoarseGrainedForceField(
        BEADS, 300.0, energy(1.9, 20.0), GraphConfiguration(width=4, filters=4, interactions=1)
    )
    with pytest.raises(ConfigurationError, match="has a GraphNetwork: take method = 'dp_sgd'"):
        train_privately(graph, data, budget, private)
    assert train_privately(graph, data, budget, quick, seed=0).ledger.epsilon <= 9.0  # by DP-SGD
    with pytest.raises(ConfigurationError, match="a PriorEnergy needs a learner"):
        train_privately(energy(1.9, 20.0), data, budget, quick)
    force_field.set_examples(frames[0].positions)
    with pytest.raises(ConfigurationError, match=r"32 of the 32 example frames .* are frames of the private data"):
        trajectory_units(force_field, *frames)
