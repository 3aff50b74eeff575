"""Telling frames from samples of a flow: the density that does it best is that of the frames, whatever the flow."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.forcefields.training.augmented_flow import FlowTeacher, TeacherConfiguration
from flowbridge.forcefields.training.configuration import CoarseTrainingConfiguration
from flowbridge.forcefields.training.fitting import Lesson, student_of
from flowbridge.forcefields.training.gradients import ranking_loss
from flowbridge.forcefields.training.noise_contrastive import ContrastedStudentTraining
from flowbridge.integrations.openmm.sampling.torsion_bias import torsion_angles

NETWORK = InvariantConfiguration(width=16, depth=2)


class TestContrast:
    """On a line, where everything is known: frames of N(0, 1), samples of N(0.4, 1.5)."""

    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(20_000, generator=generator, dtype=torch.float64)
    samples = 0.4 + 1.5 * torch.randn(4_000, generator=generator, dtype=torch.float64)

    def _log_ratio(self, x, stiffness):
        density = -0.5 * ((x - 0.4) / 1.5).square() - math.log(1.5)
        return 7.0 - 0.5 * stiffness * x.square() - density  # 7: a constant that must not matter

    def _contrast(self, stiffness):
        return ranking_loss(self._log_ratio(self.frames, stiffness), self._log_ratio(self.samples, stiffness))

    def test_least_at_the_density_of_the_frames(self):
        stiffness = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([stiffness], max_iter=30, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            loss = self._contrast(stiffness)
            loss.backward()
            return loss

        with torch.no_grad():
            stiffness.fill_(0.3)
        optimiser.step(closure)
        # The stiffness of 20 000 normal frames alone is known to sqrt(2 / 20 000) = 0.01, and the samples add theirs.
        assert abs(float(stiffness.detach()) - 1.0) < 0.08

    def test_value_is_a_relative_entropy(self):
        """At the truth: minus the Kullback-Leibler divergence of the frames from the samples' density."""
        divergence = math.log(1.5) + (1.0 + 0.4**2) / (2.0 * 1.5**2) - 0.5
        assert abs(float(self._contrast(1.0)) + divergence) < 0.03

    def test_the_samples_own_density_scores_zero(self):
        ratio = torch.full((50,), 3.0)
        assert abs(float(ranking_loss(ratio, torch.full((70,), 3.0)))) < 1e-6


def settings(**changes):
    tables = {"compilation": "never", "samples": 3000, "student": {"steps": 5, "batch": 32}, **changes}
    return CoarseTrainingConfiguration.model_validate(tables)


@pytest.fixture(scope="module")
def lesson(bead_frames):
    """Samples of an untrained flow with two auxiliary variables, and frames."""
    mapping, frames = bead_frames
    configuration = TeacherConfiguration(
        auxiliary=2, blocks=1, components=4, hidden=(16,), stiff={"couplings": 2, "hidden": (16,)}
    )
    teacher = FlowTeacher.untrained(mapping.beads, 300.0, frames, configuration).eval()
    drawn = teacher.sample(2000, torch.Generator().manual_seed(1))
    positions = torch.from_numpy(frames)
    log_ratio = teacher.log_ratios(positions, torch.Generator().manual_seed(2))
    samples = BeadFrames(drawn.positions, drawn.forces, None, drawn.log_ratio)
    return teacher, Lesson(samples, {}, {}, teacher, BeadFrames(positions, None, None, log_ratio))


def student(bead_frames, lesson, **changes):
    mapping, frames = bead_frames
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration())
    field = CoarseGrainedForceField.untrained(prior, NETWORK, 300.0, torch.from_numpy(frames)).double()
    return field, student_of(field, lesson, settings(**changes), 3)


def test_log_ratio_is_the_density_beside_normal_auxiliary_variables(lesson):
    teacher, given = lesson
    auxiliary = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    position = given.frames.positions[:1]
    normal = -0.5 * float(auxiliary.square().sum()) - math.log(2.0 * math.pi)
    expected = float(teacher.log_prob(position, auxiliary).detach()) - normal
    assert abs(float(teacher.log_ratio(position, auxiliary).detach()) - expected) < 1e-9


def test_gradients_of_a_step_against_finite_differences(bead_frames, lesson):
    field, module = student(bead_frames, lesson[1], contrast=0.7)
    assert isinstance(module, ContrastedStudentTraining)

    def loss():
        return module.loss(torch.Generator().manual_seed(9))

    parameter = field.network.hidden[1].weight
    loss().backward()
    slope, before = float(parameter.grad[2, 5]), float(parameter.detach()[2, 5])
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[2, 5] = before + shift
        values.append(float(loss().detach()))
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-4 * max(1.0, abs(slope))


def test_what_the_flow_does_not_know_is_learned_from_frames(bead_frames, lesson):
    """The untrained flow spreads the torsions evenly; frames do not. With the contrast the student knows, without not."""
    field, module = student(bead_frames, lesson[1], contrast=1.0)
    start = module.held_out_loss(field.network)
    optimiser = torch.optim.Adam(field.network.parameters(), lr=5e-3)
    for step in range(80):
        optimiser.zero_grad()
        module.loss(torch.Generator().manual_seed(step)).backward()
        optimiser.step()
    teacher, given = lesson
    drawn = teacher.propose(4_000, torch.Generator().manual_seed(11))
    with torch.no_grad():
        log_weights = -field(drawn.positions) / thermal_energy(300.0) - drawn.log_ratio
    weights = torch.softmax(log_weights, 0).numpy()
    torsions = [np.cos(torsion_angles(p.numpy(), (1, 2, 3, 4))) for p in (drawn.positions, given.contrasted.positions)]
    before = abs(torsions[0].mean() - torsions[1].mean())
    after = abs(float(weights @ torsions[0]) - torsions[1].mean())
    assert before > 0.2
    assert after < 0.3 * before
    assert module.held_out_loss(field.network) < start - 0.1


def test_without_weight_there_is_none(bead_frames, lesson):
    teacher_samples = lesson[1]._replace(contrasted=None)
    _, module = student(bead_frames, teacher_samples)
    assert not isinstance(module, ContrastedStudentTraining)


def test_log_ratios_are_needed(bead_frames, lesson):
    bare = lesson[1]._replace(contrasted=BeadFrames(lesson[1].contrasted.positions))
    with pytest.raises(ConfigurationError, match="log-ratio of every frame"):
        student(bead_frames, bare)


def test_log_ratios_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="as many log-ratios"):
        BeadFrames(torch.zeros(5, 3, 3), None, None, torch.zeros(4))
