"""Proposals of a Boltzmann generator for Markov chains: steps in latent space that leave the flow's density unchanged."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from .boltzmann_generator import BoltzmannGenerator
from .molecule_coordinates import Coordinates
from .position_sampler import PositionSampler

_AHEAD = 64  # independent configurations drawn at once: a batch costs hardly more than a single one


class Proposal(NamedTuple):
    """A proposed configuration ``(N, 3)`` nm, in an orientation of its own, and the flow's log-density there."""

    positions: Tensor
    log_prob: float


class LatentProposals:
    """Proposes configurations by a Markov chain in latent space that is reversible with respect to the base density.

    With normal latent variables ``z' = sqrt(1 - s^2) z + s e`` (the preconditioned Crank-Nicolson step, Cotter et al.,
    Statistical Science 28, 424 (2013)); angles move by up to ``s`` half turns and are wrapped, variables on an interval
    by up to its length times ``s`` and are reflected. Every such step is reversible with respect to the flow's density q, so
    that the rule of Metropolis and Hastings for a target pi is ``min(1, pi(x') q(x) / (pi(x) q(x')))`` for every s. With
    s = 1 the proposal does not depend on the present configuration at all: the independence sampler.

    Args:
        model: the generator.
        scale: s, in (0, 1].
        generator: of all random numbers.
        compilation: see :class:`~flowbridge.flows.position_sampler.PositionSampler`.
    """

    def __init__(
        self, model: BoltzmannGenerator, scale: float, generator: torch.Generator, compilation: str = "cached"
    ) -> None:
        if not 0.0 < scale <= 1.0:
            raise ConfigurationError(f"scale must be above 0 and at most 1 (independent proposals), got {scale}")
        self.model, self.scale, self.generator = model, scale, generator
        self._sampler = PositionSampler(model, _AHEAD, compilation)
        self._ahead: list[Proposal] = []

    def __call__(self, positions: Tensor) -> Proposal:
        """Return a proposal from a configuration ``(N, 3)`` nm."""
        if self.scale < 1.0:
            return self._step(positions)
        if not self._ahead:
            drawn = self._sampler(_AHEAD, self.generator)
            densities = drawn.log_prob.tolist()
            self._ahead = [Proposal(x, log_prob) for x, log_prob in zip(drawn.positions, densities, strict=True)][::-1]
        return self._ahead.pop()

    def log_prob(self, positions: Tensor) -> float:
        """Return the flow's log-density of a configuration ``(N, 3)`` nm."""
        with torch.no_grad():
            return float(self.model.log_prob(positions.unsqueeze(0)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a chain needs to go on with the same numbers."""
        return {
            "generator": self.generator.get_state(),
            "positions": [proposal.positions for proposal in self._ahead],
            "log_prob": [proposal.log_prob for proposal in self._ahead],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.generator.set_state(state["generator"])
        self._ahead = [Proposal(*pair) for pair in zip(state["positions"], state["log_prob"], strict=True)]

    def _step(self, positions: Tensor) -> Proposal:
        with torch.no_grad():
            coordinates, _ = self.model.coordinates.inverse(positions.unsqueeze(0))
            latent, _ = self.model.flow.inverse(coordinates)
            turned = latent.circular + self.scale * (self._uniform(latent.circular) - 0.5)
            stiff = self._moved(latent.stiff)
            drawn = self.model.positions_of(Coordinates(turned - turned.floor(), stiff))
            return Proposal(drawn.positions[0], float(drawn.log_prob))

    def _moved(self, stiff: Tensor) -> Tensor:
        if self.model.flow.uniform_base:
            moved = stiff + self.scale * (2.0 * self._uniform(stiff) - 1.0)
            return 1.0 - (1.0 - moved.abs()).abs()
        noise = torch.randn(stiff.shape, generator=self.generator, dtype=stiff.dtype)
        return math.sqrt(1.0 - self.scale**2) * stiff + self.scale * noise

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype)
