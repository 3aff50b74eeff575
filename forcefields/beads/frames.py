"""Frames of beads with forces, weights and log-ratios."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigurationError

_SEGMENTS = 4


@dataclass(frozen=True)
class BeadFrames:
    """Frames of beads.

    Attributes:
        positions: ``(F, n, 3)`` nm.
        forces: ``(F, n, 3)`` kJ/mol/nm; None where there are none.
        weights: ``(F,)``; None for equal ones.
        log_ratio: ``(F,)`` log-density of a flow there, relative to its auxiliary variables (see
            :class:`~flowbridge.forcefields.training.augmented_flow.Proposals`); None where no flow was asked.
    """

    positions: Tensor
    forces: Tensor | None = None
    weights: Tensor | None = None
    log_ratio: Tensor | None = None

    def __post_init__(self) -> None:
        if self.forces is not None and self.forces.shape != self.positions.shape:
            raise ConfigurationError(
                f"positions {tuple(self.positions.shape)} and forces {tuple(self.forces.shape)} do not belong together"
            )
        if self.log_ratio is not None and self.log_ratio.shape != (len(self.positions),):
            raise ConfigurationError(
                f"{len(self.positions)} frames have as many log-ratios, not {tuple(self.log_ratio.shape)}"
            )
        if self.weights is not None:
            good = self.weights.shape == (len(self.positions),) and bool(
                torch.isfinite(self.weights).all() and (self.weights >= 0.0).all() and self.weights.sum() > 0.0
            )
            if not good:
                raise ConfigurationError(
                    f"weights of {len(self.positions)} frames must be as many finite numbers, none negative and not all zero"
                )

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, chosen: Tensor | slice) -> BeadFrames:
        others = (None if one is None else one[chosen] for one in (self.forces, self.weights, self.log_ratio))
        return BeadFrames(self.positions[chosen], *others)

    def split(self, held_out: float) -> tuple[BeadFrames, BeadFrames]:
        """Return training frames and held-out frames, the ends of four equal segments, since neighbours are alike."""
        bounds = np.linspace(0, len(self), _SEGMENTS + 1).round().astype(int)
        late = torch.zeros(len(self), dtype=torch.bool)
        for start, end in itertools.pairwise(bounds):
            late[end - max(round((end - start) * held_out), 1) : end] = True
        return self[torch.nonzero(~late)[:, 0]], self[torch.nonzero(late)[:, 0]]
