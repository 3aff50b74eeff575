"""The teacher's density and forces, and training by every method."""

import math
import shutil

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.forcefields.prior_terms import FourierTorsions, HarmonicAngles, HarmonicBonds, PriorEnergy
from flowbridge.forcefields.training.augmented_flow import FlowTeacher, TeacherConfiguration
from flowbridge.forcefields.training.configuration import CoarseTrainingConfiguration
from flowbridge.forcefields.training.fitting import teacher_frames, train_force_field
from flowbridge.forcefields.training.modules import StudentTraining, drawn
from flowbridge.integrations.openmm.sampling.torsion_bias import torsion_angles

from .conftest import chain

SMALL_TEACHER = TeacherConfiguration(
    auxiliary=2, blocks=1, components=4, hidden=(16,), stiff={"couplings": 2, "hidden": (16,)}
)
NETWORK = InvariantConfiguration(width=32, depth=2, lipschitz=4.0)


def shaken(bead_frames, amplitude):
    mapping, frames = bead_frames
    flow = FlowTeacher.untrained(mapping.beads, 300.0, frames, SMALL_TEACHER).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.flow.parameters():
            parameter.add_(amplitude * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return flow.eval()


@pytest.fixture(scope="module")
def teacher(bead_frames):
    """An untrained teacher whose layers are no identities."""
    return shaken(bead_frames, 0.1)


@pytest.fixture(scope="module")
def gentle(bead_frames):
    """An untrained teacher whose samples look like beads."""
    return shaken(bead_frames, 0.01)


class TestTeacher:
    def test_joint_forces_against_finite_differences(self, teacher, bead_frames):
        x = torch.from_numpy(bead_frames[1][5:7])
        auxiliary = torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=torch.float64)
        forces, kt = teacher.evaluate(x, auxiliary).forces, thermal_energy(300.0)
        for bead, axis in ((0, 0), (2, 2), (4, 1)):
            shift = torch.zeros_like(x)
            shift[:, bead, axis] = 1e-6
            slope = kt * (teacher.log_prob(x + shift, auxiliary) - teacher.log_prob(x - shift, auxiliary)) / 2e-6
            assert torch.allclose(forces[:, bead, axis], slope, rtol=1e-4, atol=1e-2)

    def test_density_of_samples(self, teacher):
        """The density along the way to a sample is the one that is found when it is looked at again: the flow inverts."""
        coordinates, auxiliary = teacher.flow.sample(200, torch.Generator().manual_seed(3))
        turns, noise = coordinates.circular, auxiliary
        for block in reversed(teacher.flow.blocks):
            turns, noise, _ = block.inverse(turns, noise)
        for block in teacher.flow.blocks:
            turns, noise = block(turns, noise)
        gap = turns - coordinates.circular
        assert float((gap - gap.round()).detach().abs().max()) < 1e-9
        assert float((noise - auxiliary).detach().abs().max()) < 1e-9

    def test_density_is_normalised(self, teacher, bead_frames):
        """The integral over torsions and auxiliary variables at fixed stiff coordinates, by uniform and normal draws."""
        generator = torch.Generator().manual_seed(0)
        flow, count = teacher.flow, 60_000
        turns = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        noise = 1.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
        log_det = torch.zeros(count, dtype=torch.float64)
        z, auxiliary = turns, noise
        with torch.no_grad():
            for block in reversed(flow.blocks):
                z, auxiliary, change = block.inverse(z, auxiliary)
                log_det = log_det + change
        log_p = log_det - 0.5 * auxiliary.square().sum(-1) - math.log(2.0 * math.pi)
        log_q = -0.5 * (noise / 1.5).square().sum(-1) - math.log(2.0 * math.pi * 1.5**2)
        ratio = (log_p - log_q).exp().numpy()
        assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / np.sqrt(count)

    def test_determinant_of_a_block(self, teacher):
        block = teacher.flow.blocks[0]
        point = torch.tensor([0.31, 0.77, 0.4, -0.9], dtype=torch.float64)

        def mapped(value):
            turns, noise, _ = block.inverse(value[None, :2], value[None, 2:])
            return torch.cat([turns, noise], 1)[0]

        jacobian = torch.autograd.functional.jacobian(mapped, point)
        _, _, log_det = block.inverse(point[None, :2], point[None, 2:])
        assert torch.isclose(torch.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-8)

    def test_joint_forces_average_to_the_marginal_force(self, teacher, bead_frames):
        """At fixed beads, over auxiliary variables of the posterior: the gradient of the log of the integrated density."""
        x = torch.from_numpy(bead_frames[1][9:10])
        grid = torch.linspace(-5.0, 5.0, 121, dtype=torch.float64)
        a, b = torch.meshgrid(grid, grid, indexing="ij")
        auxiliary = torch.stack([a.flatten(), b.flatten()], 1)

        def log_marginal(position):
            return torch.logsumexp(teacher.log_prob(position.expand(len(auxiliary), -1, -1), auxiliary), 0)

        joint = teacher.log_prob(x.expand(len(auxiliary), -1, -1), auxiliary).detach()
        weights = torch.softmax(joint, 0)
        forces = teacher.evaluate(x.expand(len(auxiliary), -1, -1), auxiliary).forces
        average = (weights[:, None, None] * forces).sum(0)
        leaf = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(log_marginal(leaf), leaf)
        assert torch.allclose(average, thermal_energy(300.0) * gradient[0], rtol=1e-6, atol=1e-6)
        assert float(forces.std(0).max()) > 1.0  # there is something to average

    def test_proposals_reweight_to_another_density(self, gentle, bead_frames):
        """The prior's bond lengths have their Boltzmann average under importance weights from the flow."""
        mapping, frames = bead_frames
        prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration())
        drawn_ = gentle.propose(30_000, torch.Generator().manual_seed(5))
        weights = torch.softmax(-prior(drawn_.positions) / thermal_energy(300.0) - drawn_.log_ratio, 0)
        assert float(1.0 / weights.square().sum()) > 50
        bond = (drawn_.positions[:, 1] - drawn_.positions[:, 0]).norm(dim=-1)
        term = prior.term("bonds")
        kt = thermal_energy(300.0)
        # p(b) ~ b^2 exp(-k/2kT (b - b0)^2): the mean is b0 + 2 kT / (k b0) to first order.
        expected = float(term.lengths[0] + 2.0 * kt / (term.stiffness[0] * term.lengths[0]))
        error = float((weights.square() * (bond - bond.mean()).square()).sum().sqrt())
        assert abs(float((weights * bond).sum()) - expected) < 4.0 * error

    def test_too_short_a_chain(self):
        frames = np.random.default_rng(0).standard_normal((500, 3, 3)) * 0.01 + np.array(
            [[0, 0, 0], [0.3, 0, 0], [0.4, 0.3, 0]]
        )
        with pytest.raises(ConfigurationError, match="at least four beads"):
            FlowTeacher.untrained(chain(3), 300.0, frames, SMALL_TEACHER)


def settings(method, **changes):
    tables = {
        "method": method, "samples": 4000, "log_interval": 50, "checkpoint_interval": 40, "compilation": "never",
        "teacher": {"steps": 250, "batch": 128, "learning_rate": 3e-3},
        "student": {"steps": 250, "batch": 128, "learning_rate": 5e-3},
        **changes,
    }  # fmt: skip
    return CoarseTrainingConfiguration.model_validate(tables)


@pytest.fixture(scope="module")
def known():
    """A chain of four beads with an energy in closed form, its frames by independent samples, and exact forces."""
    beads = chain(4)
    kt = thermal_energy(300.0)
    truth = PriorEnergy(
        beads,
        [
            HarmonicBonds(beads.bonds, lengths=[0.38] * 3, stiffness=[8000.0] * 3),
            HarmonicAngles([(0, 1, 2), (1, 2, 3)], centres=[1.9] * 2, stiffness=[100.0] * 2),
            FourierTorsions([(0, 1, 2, 3)], cosines=[[2.5, 2.0]], sines=[[2.0, 0.0]]),
        ],
        300.0,
    )
    random, count = np.random.default_rng(4), 6000
    bonds = 0.38 + np.sqrt(kt / 8000.0) * random.standard_normal((count, 3))
    angles = 1.9 + np.sqrt(kt / 100.0) * random.standard_normal((count, 2))
    grid = np.linspace(-np.pi, np.pi, 20_001)
    density = np.exp(-(2.5 * np.cos(grid) + 2.0 * np.sin(grid) + 2.0 * np.cos(2 * grid)) / kt)
    torsions = np.interp(random.random(count), np.cumsum(density) / density.sum(), grid)
    positions = _placed(bonds, angles, torsions)
    # Exact samples would have the volume b^2 sin a besides: take it out by weights.
    weights = np.square(bonds).prod(1) * np.sin(angles).prod(1)
    keep = random.random(count) < weights / weights.max()
    frames = torch.from_numpy(positions[keep])
    return beads, truth, BeadFrames(frames, truth.energy_and_forces(frames).forces)


class TestMethods:
    """Every method learns the torsion, which the priors of bonds and angles know nothing of."""

    prior = PriorConfiguration()

    def _profile(self, beads, model, frames):
        """Energy along the torsion at rest, relative to its mean."""
        grid = np.linspace(-2.0, 2.0, 33)
        placed = _placed(np.full((33, 3), 0.38), np.full((33, 2), 1.9), grid)
        energy = model(torch.from_numpy(placed)).detach().numpy()
        return energy - energy.mean()

    @pytest.mark.parametrize(
        ("method", "noise", "tolerance"),
        [
            ("force_matching", None, 0.8),
            ("noised_force_matching", {"width": 0.002, "force_share": 1.0}, 1.2),
            ("flow_matching", None, 1.6),
        ],
    )
    def test_a_torsion_is_learned(self, known, tmp_path, method, noise, tolerance):
        beads, truth, frames = known
        given = frames if method != "flow_matching" else BeadFrames(frames.positions)
        changes = {} if noise is None else {"noise": noise}
        result = train_force_field(
            beads, given, 300.0, self.prior, NETWORK, SMALL_TEACHER, settings(method, **changes), tmp_path, 3
        )
        expected = self._profile(beads, truth, frames)
        found = self._profile(beads, result.force_field, frames)
        before = np.sqrt(np.square(expected).mean())
        error = np.sqrt(np.square(found - expected).mean())
        assert error < tolerance  # kJ/mol
        assert error < 0.6 * before
        layers = result.force_field.bounded_layers
        assert max(float(torch.linalg.matrix_norm(one.weight.detach().double(), 2)) for one in layers) <= 4.0 + 1e-5

    def test_noise_without_forces(self, known, tmp_path):
        """The noise's own force has the same average: regression of one label on the other has slope one."""
        beads, _truth, frames = known
        field = CoarseGrainedForceField.untrained(PriorEnergy(beads, [], 300.0), NETWORK, 300.0, frames.positions)
        noise = settings("noised_force_matching", noise={"width": 0.02, "force_share": 0.0}).noise
        stage = settings("force_matching").student
        exact = noise.model_copy(update={"force_share": 1.0})
        labels = []
        for share in (noise, exact):
            module = StudentTraining(field, stage, frames.positions, frames.forces, None, None, 1, 10, share)
            # Every frame once: what is drawn repeatedly carries no more information.
            labels.append(module._noised(frames.positions, frames.forces, torch.Generator().manual_seed(8)))
        (moved, own), (same, mapped) = labels
        assert torch.equal(moved, same)
        # Compared through a function of the noised positions, the first bond; by the virial theorem both give 3 kT.
        direction = moved[:, 1] - moved[:, 0]
        for label in (own, mapped):
            values = (label[:, 0] * direction).sum(-1).double().numpy()
            assert abs(values.mean() - 3.0) < 4.0 * values.std() / np.sqrt(len(values))
            assert values.std() / np.sqrt(len(values)) < 0.7

    def test_resumed_training_repeats_its_numbers(self, known, tmp_path):
        beads, _, frames = known
        short = settings(
            "flow_matching", teacher={"steps": 60, "batch": 32}, student={"steps": 60, "batch": 32}, samples=500
        )
        whole = train_force_field(beads, frames, 300.0, self.prior, NETWORK, SMALL_TEACHER, short, tmp_path / "a", 3)
        # What is left of a run that was killed after its checkpoint at step 40: nothing later.
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        again = train_force_field(beads, frames, 300.0, self.prior, NETWORK, SMALL_TEACHER, short, tmp_path / "b", 3)
        for a, b in zip(whole.force_field.state_dict().values(), again.force_field.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class TestRefused:
    def test_missing_forces(self, known, tmp_path):
        beads, _, frames = known
        with pytest.raises(ConfigurationError, match=r"there are none.*flow_matching', which needs none"):
            train_force_field(
                beads, BeadFrames(frames.positions), 300.0, PriorConfiguration(), NETWORK, SMALL_TEACHER,
                settings("force_matching"), tmp_path, 1,
            )  # fmt: skip

    def test_too_few_frames(self, known, tmp_path):
        beads, _, frames = known
        with pytest.raises(ConfigurationError, match="50 frames are too few"):
            train_force_field(
                beads, frames[slice(0, 50)], 300.0, PriorConfiguration(), NETWORK, SMALL_TEACHER,
                settings("force_matching"), tmp_path, 1,
            )  # fmt: skip

    def test_arrays_that_do_not_fit(self, known):
        _, _, frames = known
        with pytest.raises(ConfigurationError, match="do not belong together"):
            BeadFrames(frames.positions, frames.forces[:-1])
        with pytest.raises(ConfigurationError, match="none negative"):
            BeadFrames(frames.positions, None, -torch.ones(len(frames)))


def test_samples_with_enormous_forces_are_counted(gentle, bead_frames):
    mapping, frames = bead_frames
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(repulsion=3200.0, repulsion_quantile=0.3))
    field = CoarseGrainedForceField.untrained(prior, NETWORK, 300.0, torch.from_numpy(frames))
    given = settings("flow_matching", samples=500, largest_mean_square_force=1e5)
    found, metadata = teacher_frames(gentle, field, given, 1)
    assert len(found) + metadata["teacher_samples_left_out"] == 500
    assert 0.0 < metadata["repulsion_effective_percent"] < 100.0
    assert found.weights is not None


def test_drawing_by_weights():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    chosen = drawn(4, weights, 20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(chosen, minlength=4)
    assert counts[0] == counts[3] == 0
    assert abs(int(counts[2]) - 15_000) < 4 * np.sqrt(20_000 * 0.75 * 0.25)


def test_held_out_frames_are_the_ends_of_segments():
    frames = BeadFrames(torch.arange(40.0)[:, None, None].expand(40, 1, 3))
    kept, late = frames.split(0.2)
    assert late.positions[:, 0, 0].tolist() == [8, 9, 18, 19, 28, 29, 38, 39]
    assert len(kept) == 32


def _placed(bonds, angles, torsions):
    """Return positions ``(F, 4, 3)`` of a chain of four beads."""
    count = len(bonds)
    x = np.zeros((count, 4, 3))
    x[:, 1, 0] = bonds[:, 0]
    x[:, 2] = x[:, 1] + bonds[:, 1, None] * np.stack([-np.cos(angles[:, 0]), np.sin(angles[:, 0]), np.zeros(count)], 1)
    axis = (x[:, 2] - x[:, 1]) / bonds[:, 1, None]
    cis = x[:, 0] - x[:, 1]
    cis = cis - (cis * axis).sum(1, keepdims=True) * axis
    cis /= np.linalg.norm(cis, axis=1, keepdims=True)
    across = np.cross(axis, cis)
    sine = np.sin(angles[:, 1])
    x[:, 3] = x[:, 2] + bonds[:, 2, None] * (
        -np.cos(angles[:, 1])[:, None] * axis
        + (sine * np.cos(torsions))[:, None] * cis
        + (sine * np.sin(torsions))[:, None] * across
    )
    found = torsion_angles(x, (0, 1, 2, 3))
    assert np.allclose(np.cos(found), np.cos(torsions), atol=1e-9)
    return x
