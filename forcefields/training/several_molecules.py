"""One graph network for several molecules: trained on the frames of all of them, used on sequences that none of them has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ...core.training.trainer import train
from ..beads.frames import BeadFrames
from ..coarse_grained_force_field import CoarseGrainedForceField
from ..networks.graph_network import GraphConfiguration, GraphNetwork, bead_types
from ..prior_statistics import PriorConfiguration, fit_prior
from .augmented_flow import TeacherConfiguration
from .configuration import CoarseTrainingConfiguration
from .fitting import CoarseTrainingResult, metadata_of, refuse_frames, student_of, taught_frames
from .modules import CoarseObjective, StudentTraining

_OFFSET = 104_729  # separates the seeds of molecules


class SharedTraining(CoarseObjective):
    """Force matching of one network on several molecules; the loss is the mean of theirs, each over its own scale.

    Args:
        members: the training of each molecule; their networks share all parameters with the first one's.
        seed: of the batches.
        log_interval: steps between points of the curve.
    """

    def __init__(self, members: Sequence[StudentTraining], seed: int, log_interval: int) -> None:
        super().__init__(members[0].module, members[0].stage, seed, log_interval)
        self.members = list(members)  # a plain list: they are no parts whose parameters count

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch."""
        return torch.stack([member.loss(generator) for member in self.members]).mean()

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return the mean of the members' losses of held-out frames; None where there are none."""
        if not isinstance(module, GraphNetwork):
            raise TypeError(f"only a GraphNetwork serves several molecules, not a {type(module).__name__}")
        losses = [
            member.held_out_loss(module.serving(member.force_field.metadata.particles)) for member in self.members
        ]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None


def train_on_several_molecules(
    molecules: Sequence[tuple[Particles, BeadFrames]],
    temperature: float,
    prior: PriorConfiguration,
    network: GraphConfiguration,
    teacher: TeacherConfiguration,
    settings: CoarseTrainingConfiguration,
    folder: Path,
    seed: int,
    show_progress: bool = False,
) -> list[CoarseTrainingResult]:
    """Fit a prior to each molecule's frames and train one network on top of all of them.

    :meth:`~flowbridge.forcefields.coarse_grained_force_field.CoarseGrainedForceField.transferred` gives the force field of
    another sequence.

    Args:
        molecules: beads with bonds, and frames, of each; force matching needs forces in all of them.
        temperature: of all frames, K.
        prior: which terms each has.
        network: its sizes; the vocabulary is all types that occur, besides those it lists.
        teacher: sizes of the flow that learns each molecule's frames (flow-matching only).
        settings: method and schedules.
        folder: where checkpoints go; training continues from those it finds there.
        seed: of everything random.
        show_progress: show a bar for each stage.

    Returns:
        One result for each molecule. The force fields are independent copies; the curve ``student`` is of all.

    Raises:
        ConfigurationError: for no molecules; otherwise as :func:`~flowbridge.forcefields.training.fitting.train_force_field`.
        ConvergenceError: when a loss is not finite.
        NonFiniteEnergyError: when most samples of a teacher are of no use.
    """
    if not molecules:
        raise ConfigurationError("there are no molecules to train on: give beads and frames of at least one")
    for _, frames in molecules:
        refuse_frames(frames, settings)
    occurring = {name for beads, _ in molecules for name in bead_types(beads, network)}
    known = network.model_copy(update={"vocabulary": tuple(sorted(occurring | set(network.vocabulary)))})
    force_fields: list[CoarseGrainedForceField] = []
    members: list[StudentTraining] = []
    curves: list[dict[str, list[dict[str, float]]]] = []
    metadata: list[dict[str, Any]] = []
    shared: GraphNetwork | None = None
    for number, (beads, frames) in enumerate(molecules):
        weights = None if frames.weights is None else frames.weights.double().numpy()
        fitted = fit_prior(beads, frames.positions.double().numpy(), temperature, prior, weights)
        serving = GraphNetwork(beads, known) if shared is None else shared.serving(beads)
        shared = shared or serving
        field = CoarseGrainedForceField(beads, temperature, fitted, known, frames.positions)
        field.network = serving
        own_seed = seed + number * _OFFSET
        lesson = taught_frames(
            beads, frames, temperature, field, teacher, settings, folder / f"molecule_{number}", own_seed, show_progress
        )
        members.append(student_of(field, lesson, settings, own_seed))
        force_fields.append(field)
        curves.append(lesson.curves)
        metadata.append(lesson.metadata)
    together = SharedTraining(members, seed, settings.log_interval)
    curve = train(together, folder / "student", settings.checkpoint_interval, show_progress)
    results = []
    for field, member, own_curves, own_metadata in zip(force_fields, members, curves, metadata, strict=True):
        own_metadata = {**own_metadata, **metadata_of(member)}
        results.append(
            CoarseTrainingResult(copy.deepcopy(field).eval(), {**own_curves, "student": curve}, own_metadata)
        )
    return results
