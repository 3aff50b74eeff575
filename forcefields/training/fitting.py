"""From bead frames to a coarse-grained force field: force matching, flow-matching, noised force matching."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ...core.potential import Particles
from ...core.statistics.estimates import effective_sample_percent
from ...core.training.trainer import train
from ...core.units import thermal_energy
from ...flows.boltzmann.training.compiled_gradients import compilation_of
from ..beads.frames import BeadFrames
from ..coarse_grained_force_field import CoarseGrainedForceField
from ..networks.graph_network import GraphConfiguration
from ..networks.invariant_network import InvariantConfiguration
from ..prior_statistics import PriorConfiguration, fit_prior
from .augmented_flow import FlowTeacher, TeacherConfiguration
from .configuration import CoarseTrainingConfiguration
from .modules import StudentTraining, TeacherTraining
from .noise_contrastive import ContrastedStudentTraining

_FEWEST = 100
_OFFSET = 7_919  # separates the seeds of teacher, its samples, and student


@dataclass(frozen=True)
class CoarseTrainingResult:
    """A trained force field, training curves by stage, numbers worth reporting, and the flow that taught, if one did."""

    force_field: CoarseGrainedForceField
    curves: dict[str, list[dict[str, float]]]
    metadata: dict[str, Any] = field(default_factory=dict)
    teacher: FlowTeacher | None = None


def train_force_field(
    beads: Particles,
    frames: BeadFrames,
    temperature: float,
    prior: PriorConfiguration,
    network: InvariantConfiguration | GraphConfiguration | nn.Module,
    teacher: TeacherConfiguration,
    settings: CoarseTrainingConfiguration,
    folder: Path,
    seed: int,
    show_progress: bool = False,
) -> CoarseTrainingResult:
    """Fit a prior to frames and train a network on top of it.

    Args:
        beads: with their bonds.
        frames: of one ensemble; forces are needed by force matching only.
        temperature: of the frames, K.
        prior: which terms it has.
        network: its sizes, or a network that gives energies in kT (see :class:`CoarseGrainedForceField`).
        teacher: the flow's sizes (flow-matching only).
        settings: method and schedules.
        folder: where checkpoints go; training continues from those it finds there.
        seed: of everything random.
        show_progress: show a bar for each stage.

    Raises:
        ConfigurationError: for too few frames, broken molecules, and missing forces.
        ConvergenceError: when a loss is not finite.
        NonFiniteEnergyError: when most samples of the teacher are of no use.
    """
    refuse_frames(frames, settings)
    weights = None if frames.weights is None else frames.weights.double().numpy()
    fitted = fit_prior(beads, frames.positions.double().numpy(), temperature, prior, weights)
    force_field = CoarseGrainedForceField.untrained(fitted, network, temperature, frames.positions, frames.weights)
    lesson = taught_frames(beads, frames, temperature, force_field, teacher, settings, folder, seed, show_progress)
    student = student_of(force_field, lesson, settings, seed)
    curve = train(student, folder / "student", settings.checkpoint_interval, show_progress)
    metadata = {**lesson.metadata, **metadata_of(student)}
    return CoarseTrainingResult(force_field.eval(), {**lesson.curves, "student": curve}, metadata, lesson.teacher)


class Lesson(NamedTuple):
    """What a network learns from.

    Attributes:
        frames: with forces: those given, or samples of a flow.
        curves: of what it took to make them.
        metadata: numbers worth reporting.
        teacher: the flow; None for other methods.
        contrasted: the given frames with the flow's log-ratios, to be told from its samples; None for other methods.
    """

    frames: BeadFrames
    curves: dict[str, list[dict[str, float]]]
    metadata: dict[str, Any]
    teacher: FlowTeacher | None = None
    contrasted: BeadFrames | None = None


def taught_frames(
    beads: Particles,
    frames: BeadFrames,
    temperature: float,
    force_field: CoarseGrainedForceField,
    teacher: TeacherConfiguration,
    settings: CoarseTrainingConfiguration,
    folder: Path,
    seed: int,
    show_progress: bool = False,
) -> Lesson:
    """Return the frames that a network is trained on: those given, or for flow-matching those of a flow that learned them.

    Arguments and errors as for :func:`train_force_field`; ``force_field`` has the prior.
    """
    metadata: dict[str, Any] = {"method": settings.method, "frames": len(frames)}
    if settings.method != "flow_matching":
        return Lesson(frames, {}, metadata)
    flow, curve, found = train_teacher(beads, frames, temperature, teacher, settings, folder, seed, show_progress)
    drawn, samples = teacher_frames(flow, force_field, settings, seed + 2 * _OFFSET)
    contrasted = None
    if settings.contrast > 0.0:
        log_ratio = flow.log_ratios(frames.positions, torch.Generator().manual_seed(seed + 3 * _OFFSET))
        contrasted = BeadFrames(frames.positions, None, frames.weights, log_ratio)
    return Lesson(drawn, {"teacher": curve}, metadata | found | samples, flow, contrasted)


def student_of(
    force_field: CoarseGrainedForceField, lesson: Lesson, settings: CoarseTrainingConfiguration, seed: int
) -> StudentTraining:
    """Return the training of a force field's network on a lesson's frames, some of which are held out."""
    train_set, held_out = lesson.frames.split(settings.held_out)
    compilation = compilation_of(settings.compilation, settings.student.steps)
    if lesson.contrasted is not None:
        return ContrastedStudentTraining(
            force_field, settings.student, train_set, held_out, *lesson.contrasted.split(settings.held_out),
            settings.contrast, seed + _OFFSET, settings.log_interval, compilation,
        )  # fmt: skip
    return StudentTraining(
        force_field, settings.student, train_set.positions, train_set.forces, train_set.weights,
        (held_out.positions, held_out.forces, held_out.weights), seed + _OFFSET, settings.log_interval,
        settings.noise if settings.method == "noised_force_matching" else None, compilation,
    )  # fmt: skip


def metadata_of(student: StudentTraining) -> dict[str, Any]:
    """Return what is worth reporting of a training that has ended."""
    metadata = {"held_out_force_error": student.held_out_force_error(), "label_scale_kt_per_nm": student.scale**0.5}
    if isinstance(student, ContrastedStudentTraining):
        metadata["held_out_contrast_nats"] = student.held_out_contrast(student.module)
    return metadata


def train_teacher(
    beads: Particles,
    frames: BeadFrames,
    temperature: float,
    configuration: TeacherConfiguration,
    settings: CoarseTrainingConfiguration,
    folder: Path,
    seed: int,
    show_progress: bool = False,
) -> tuple[FlowTeacher, list[dict[str, float]], dict[str, Any]]:
    """Train a flow on frames by likelihood; return it, its training curve, and numbers worth reporting.

    Arguments and errors as for :func:`train_force_field`.
    """
    train_set, held_out = frames.split(settings.held_out)
    flow = FlowTeacher.untrained(beads, temperature, train_set.positions.double().numpy(), configuration)
    module = TeacherTraining(
        flow, settings.teacher, train_set.positions, train_set.weights, held_out.positions, held_out.weights, seed,
        settings.log_interval, compilation_of(settings.compilation, settings.teacher.steps),
    )  # fmt: skip
    curve = train(module, folder / "teacher", settings.checkpoint_interval, show_progress)
    best = min((point["held_out"] for point in curve if "held_out" in point), default=math.inf)
    return flow, curve, {"held_out_negative_log_likelihood": best}


def teacher_frames(
    teacher: FlowTeacher, force_field: CoarseGrainedForceField, settings: CoarseTrainingConfiguration, seed: int
) -> tuple[BeadFrames, dict[str, Any]]:
    """Return samples of a teacher that a student can learn from, with weights where the prior repels, and what was left out.

    Samples with enormous joint forces (spots where the flow has bent space) would carry the whole loss; they are left out and
    counted. Where the prior has a repulsion, samples count by ``exp(-U_repulsion / kT)``: the flow knows no excluded volume,
    and its clashes are none of the student's business (arXiv 2203.11167).

    Raises:
        NonFiniteEnergyError: when less than half of the samples can be used.
    """
    kt = thermal_energy(teacher.temperature)
    drawn = teacher.sample(settings.samples, torch.Generator().manual_seed(seed))
    mean_square = (drawn.forces / kt).square().mean((1, 2))
    usable = torch.isfinite(mean_square) & (mean_square < settings.largest_mean_square_force)
    if float(usable.double().mean()) < 0.5:
        raise NonFiniteEnergyError(
            f"only {int(usable.sum())} of {len(usable)} samples of the teacher have forces below "
            f"{settings.largest_mean_square_force:g} (kT/nm)^2: train it longer, raise minimum_width, or raise the limit"
        )
    positions, forces, log_ratio = (tensor[usable] for tensor in drawn)
    metadata: dict[str, Any] = {"teacher_samples": len(usable), "teacher_samples_left_out": int((~usable).sum())}
    repulsion = force_field.prior.term("repulsion")
    if repulsion is None:
        return BeadFrames(positions, forces, None, log_ratio), metadata
    log_weights = -repulsion(positions) / kt
    metadata["repulsion_effective_percent"] = effective_sample_percent(log_weights.numpy())
    return BeadFrames(positions, forces, log_weights.exp(), log_ratio), metadata


def refuse_frames(frames: BeadFrames, settings: CoarseTrainingConfiguration) -> None:
    """Raise ConfigurationError for frames that a method cannot learn from."""
    if len(frames) < _FEWEST:
        raise ConfigurationError(
            f"{len(frames)} frames are too few to train a force field: give at least {_FEWEST}, and some thousand for good "
            "results"
        )
    if settings.method == "force_matching" and frames.forces is None:
        raise ConfigurationError(
            "force matching needs the forces on the atoms of every frame, and there are none: simulate with forces saved, give "
            "the System that they can be computed with, or take method = 'flow_matching', which needs none"
        )
    noised = settings.method == "noised_force_matching"
    if noised and settings.noise.force_share > 0.0 and frames.forces is None:
        raise ConfigurationError("noised force matching without forces needs force_share = 0")
