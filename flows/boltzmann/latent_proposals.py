"""Proposals of a Boltzmann generator for Markov chains: steps in latent space that leave the flow's density unchanged."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .generator import BoltzmannGenerator
from .molecule_coordinates import Coordinates
from .position_sampler import PositionSampler

_BATCH = 64  # independent configurations drawn at once: a batch costs hardly more than a single one
_STEPS = 8  # steps drawn at once from one configuration; those after the first accepted one are not used


class Proposal(NamedTuple):
    """A configuration of the chain, or one proposed for it.

    Attributes:
        positions: ``(N, 3)`` nm, those of a proposal in an orientation of its own.
        log_prob: the flow's log-density there.
        latent: its latent variables; None where they are not known.
    """

    positions: Tensor
    log_prob: float
    latent: Coordinates | None = None


class LatentProposals:
    """Proposes configurations by a Markov chain in latent space that is reversible with respect to the base density.

    With normal latent variables ``z' = sqrt(1 - s^2) z + s e`` (the preconditioned Crank-Nicolson step, Cotter et al.,
    Statistical Science 28, 424 (2013)); angles move by up to ``s`` half turns and are wrapped, variables on an interval
    by up to its length times ``s`` and are reflected. Every such step is reversible with respect to the flow's density q, so
    that the Metropolis-Hastings rule for a target pi is ``min(1, pi(x') q(x) / (pi(x) q(x')))`` for every s. With
    s = 1 the proposal does not depend on the present configuration at all: the independence sampler.

    Args:
        model: the generator.
        scale: s, in (0, 1].
        generator: source of all random numbers.
        compilation: see :class:`~flowbridge.flows.boltzmann.position_sampler.PositionSampler`.
    """

    def __init__(
        self, model: BoltzmannGenerator, scale: float, generator: torch.Generator, compilation: str = "cached"
    ) -> None:
        if not 0.0 < scale <= 1.0:
            raise ConfigurationError(f"scale must be above 0 and at most 1 (independent proposals), got {scale}")
        self.model, self.scale, self.generator = model, scale, generator
        self._sampler = PositionSampler(model, _BATCH, compilation)
        self._present: Proposal | None = None
        self._waiting: list[Proposal] = []

    def start(self, positions: Tensor) -> Proposal:
        """Go on from positions ``(N, 3)`` nm, and return what is known of them; a chain that is there already stays."""
        if self._present is None or not torch.equal(self._present.positions, positions):
            with torch.no_grad():
                log_prob = float(self.model.log_prob(positions.unsqueeze(0)))
            self._move(Proposal(positions.clone(), log_prob))
        return self.present

    def accept(self, proposal: Proposal, placed: Tensor) -> None:
        """Go on from a proposal in another orientation, at positions ``(N, 3)`` nm."""
        self._move(proposal._replace(positions=placed.clone()))

    @property
    def present(self) -> Proposal:
        """Present configuration of the chain; see :meth:`start`."""
        if self._present is None:
            raise RuntimeError("the chain has no configuration yet: call start first")
        return self._present

    def __call__(self) -> Proposal:
        """Return a proposal from the present configuration."""
        if not self._waiting:
            self._waiting = (self._steps() if self.scale < 1.0 else self._independent())[::-1]
        return self._waiting.pop()

    def state_dict(self) -> dict[str, Any]:
        """Return what a chain needs to go on with the same numbers."""
        return {
            "generator": self.generator.get_state(),
            "present": None if self._present is None else tuple(self._present),
            "ahead": [tuple(proposal) for proposal in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.generator.set_state(state["generator"])
        self._present = None if state["present"] is None else Proposal(*state["present"])
        self._waiting = [Proposal(*proposal) for proposal in state["ahead"]]

    def _move(self, configuration: Proposal) -> None:
        self._present = configuration
        if self.scale < 1.0:
            self._waiting = []  # they were steps from another one

    def _independent(self) -> list[Proposal]:
        drawn = self._sampler(_BATCH, self.generator)
        return [Proposal(*pair) for pair in zip(drawn.positions, drawn.log_prob.tolist(), strict=True)]

    def _steps(self) -> list[Proposal]:
        """Return steps from the present configuration, independent of each other."""
        with torch.no_grad():
            circular, stiff = (part.expand(_STEPS, -1) for part in self._latent())
            turned = circular + self.scale * (self._uniform(circular) - 0.5)
            latent = Coordinates(turned - turned.floor(), self._moved(stiff))
            drawn = self.model.positions_of(latent)
        variables = (Coordinates(*(part[number : number + 1] for part in latent)) for number in range(_STEPS))
        return [Proposal(*found) for found in zip(drawn.positions, drawn.log_prob.tolist(), variables, strict=True)]

    def _latent(self) -> Coordinates:
        present = self.present
        if present.latent is not None:
            return present.latent
        coordinates, _ = self.model.coordinates.inverse(present.positions.unsqueeze(0))
        latent, _ = self.model.flow.inverse(coordinates)
        return latent

    def _moved(self, stiff: Tensor) -> Tensor:
        if self.model.flow.uniform_base:
            moved = stiff + self.scale * (2.0 * self._uniform(stiff) - 1.0)
            return 1.0 - (1.0 - moved.abs()).abs()
        noise = torch.randn(stiff.shape, generator=self.generator, dtype=stiff.dtype)
        return math.sqrt(1.0 - self.scale**2) * stiff + self.scale * noise

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype)
