"""A student of flow-matching that sees the frames besides: forces of the flow, and what the flow's density has wrong.

A force field that only copies the flow copies its errors: a flow on internal coordinates knows little of which beads touch. But
the flow's density is known and the frames are there, so that a ratio can be learned. Among S samples of the flow with density
q and one frame, the frame is recognised with probability ``r(frame) / (r(frame) + sum r(samples))``, ``r = exp(-U/kT) / q``,
and the mean log-probability is largest for the U whose Boltzmann distribution is that of the frames, whatever q is (noise
contrastive estimation, Gutmann and Hyvarinen, AISTATS 2010, in its ranking form, which needs no normalisation constant: Ma and
Collins, arXiv 1809.01812; force fields by contrast with umbrella sampling: Ding and Zhang, arXiv 2205.10861). With auxiliary
variables the same holds for pairs (R, eta), with q = p(R, eta) / N(eta).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...flows.boltzmann.compiled_functions import CompiledFlowFunction
from ...flows.boltzmann.training.compiled_gradients import with_gradients
from ..beads.frames import BeadFrames
from ..coarse_grained_force_field import CoarseGrainedForceField
from .configuration import Stage
from .gradients import loss_and_slope, noise_contrastive_gradients, ranking_loss
from .modules import MOST_HELD_OUT, StudentTraining, drawn

_SAMPLES_PER_FRAME = 4


class ContrastedStudentTraining(StudentTraining):
    """Force matching on samples of a flow, together with telling them from frames.

    The loss is that of :class:`StudentTraining` plus ``weight`` times the noise-contrastive loss: by how much less likely
    (nats) frames are under the force field than under the flow.

    Args:
        force_field: its network is trained in place.
        stage: schedule; a step sees ``batch`` labels, ``batch`` frames, and four times as many samples.
        samples: of the flow, with forces and log-ratios, and weights where the prior repels.
        held_out_samples: samples to evaluate on.
        frames: of the data, with log-ratios.
        held_out_frames: frames to evaluate on.
        weight: weight of the noise-contrastive loss.
        seed: of the batches.
        log_interval: steps between points of the curve.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(
        self,
        force_field: CoarseGrainedForceField,
        stage: Stage,
        samples: BeadFrames,
        held_out_samples: BeadFrames,
        frames: BeadFrames,
        held_out_frames: BeadFrames,
        weight: float,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(
            force_field, stage, samples.positions, samples.forces, samples.weights,
            (held_out_samples.positions, held_out_samples.forces, held_out_samples.weights), seed, log_interval,
        )  # fmt: skip
        self.evaluate = CompiledFlowFunction(self.module, noise_contrastive_gradients, compilation, loss_and_slope)
        self.frames, self.held_out_frames = frames, held_out_frames
        offsets = [self._offsets(one) for one in (samples, held_out_samples, frames, held_out_frames)]
        middle = offsets[2].median()  # a constant that drops out, taken off before digits are lost in single precision
        self.offsets = [(one - middle).to(self.dtype_of_network) for one in offsets]
        self.held_out_positions = held_out_samples.positions
        self.balance = torch.tensor([1.0 / self.scale, weight], dtype=self.dtype_of_network)

    def _offsets(self, frames: BeadFrames) -> Tensor:
        """Return log r ``(F,)`` without the network."""
        if frames.log_ratio is None:
            raise ConfigurationError(
                "noise-contrastive estimation needs the flow's log-ratio of every frame and sample, and there is none"
            )
        with torch.no_grad():
            energies = [self.force_field.prior(part) for part in frames.positions.double().split(8192)]
        return -torch.cat(energies) / self.kt - frames.log_ratio

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch."""
        positions, labels = self._batch(self.stage.batch, generator)
        chosen = drawn(len(self.frames), self.frames.weights, self.stage.batch, generator)
        others = torch.randint(len(self.positions), (_SAMPLES_PER_FRAME * self.stage.batch,), generator=generator)
        dtype = self.dtype_of_network
        loss, *gradients = self.evaluate(
            positions, labels, self.frames.positions[chosen].to(dtype), self.offsets[2][chosen],
            self.positions[others].to(dtype), self.offsets[0][others], self.balance, *self.force_field.standardisation,
        )  # fmt: skip
        return with_gradients(loss, self.module, tuple(gradients))

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return force error and weighted noise-contrastive loss of held-out frames and samples; None where there are none."""
        force_error, found = super().held_out_loss(module), self.held_out_contrast(module)
        return None if force_error is None else force_error + float(self.balance[1]) * found

    def held_out_force_error(self) -> float | None:
        """See :meth:`StudentTraining.held_out_force_error`."""
        return super().held_out_loss(self.module)

    def held_out_contrast(self, trained: nn.Module) -> float:
        """Return by how much less likely (nats) held-out frames are under the force field than under the flow."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = drawn(
            len(self.held_out_frames),
            self.held_out_frames.weights,
            min(MOST_HELD_OUT, len(self.held_out_frames)),
            generator,
        )
        dtype = self.dtype_of_network
        with torch.no_grad():
            frames = trained(self.held_out_frames.positions[chosen].to(dtype))
            samples = trained(self.held_out_positions[:MOST_HELD_OUT].to(dtype))
            return float(ranking_loss(self.offsets[3][chosen] - frames, self.offsets[1][:MOST_HELD_OUT] - samples))
