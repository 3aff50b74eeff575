"""Sequences of bijections and stochastic kernels, with the exact weight of every path (Wu, Koehler, Noe, arXiv 2002.06707).

A path runs from a draw ``y_0`` of the prior through bijections and kernels to ``y_T``. What each step does to the ratio of
backward and forward probabilities adds up to ``sum dS``: ``log |det J|`` of a bijection, the log-ratio of a kernel. No density
of ``y_T`` is needed, or known; averages over ``exp(-u)/Z`` are averages over paths with the weights
``log w = -u(y_T) - log p(y_0) + sum dS``, whose mean is Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ..transforms.bijection import Bijection
from .distributions import Distribution, InterpolatedEnergy, ReducedEnergy, Schedule
from .kernels import Kernel, Moved
from .resampling import Resampling, log_mean_weight, refuse_worthless, systematic_indices


class Paths(NamedTuple):
    """A batch of paths.

    Attributes:
        latent: beginnings ``(B, D)`` in latent space.
        value: ends ``(B, D)`` in data space.
        log_ratio: ``sum dS`` of each from latent to data ``(B,)``, also of paths that were walked backward.
        log_weights: ``(B,)`` importance weights towards ``exp(-u_target)`` with their constant: the mean weight is the
            partition function. Of resampled paths they include the mean weight at that place.
        acceptance: mean fraction of accepted proposals of each kernel, in the order of the steps; NaN for kernels that
            accept all.
        resampled: number of times that paths were resampled.
    """

    latent: Tensor
    value: Tensor
    log_ratio: Tensor
    log_weights: Tensor
    acceptance: tuple[float, ...] = ()
    resampled: int = 0


class StochasticFlow(nn.Module):
    """Bijections and stochastic kernels one after the other, in the order latent -> data.

    Without kernels it is a normalizing flow, and ``log_weights`` are those of its density; without bijections it is annealed
    importance sampling.

    Args:
        prior: normalised density in latent space; its parameters, if any, are trained with the rest.
        target: reduced energy in data space.
        steps: bijections and kernels.
        fractions: fraction of the target's energy in the energy of each kernel, in their order; evenly spaced up to 1
            where None.
        learned_schedule: whether training may move the fractions.

    Raises:
        ConfigurationError: where a step is neither a Bijection nor a Kernel, or the fractions do not fit.
    """

    def __init__(
        self,
        prior: Distribution,
        target: ReducedEnergy,
        steps: Sequence[Bijection | Kernel],
        fractions: Sequence[float] | None = None,
        *,
        learned_schedule: bool = False,
    ) -> None:
        super().__init__()
        for number, step in enumerate(steps):
            if not isinstance(step, Bijection | Kernel):
                raise ConfigurationError(f"step {number} is a {type(step).__name__}: give a Bijection or a Kernel")
        kernels = sum(isinstance(step, Kernel) for step in steps)
        if fractions is None:
            fractions = [(number + 1) / kernels for number in range(kernels)]
        if len(fractions) != kernels:
            raise ConfigurationError(f"{len(fractions)} fractions were given for {kernels} kernels")
        self.prior = prior
        self.target = target
        self.steps = nn.ModuleList(steps)
        self.schedule = Schedule(fractions, learned=learned_schedule)

    def energies(self) -> list[InterpolatedEnergy]:
        """Return the energy of each kernel, in the order of the steps."""
        return [InterpolatedEnergy(self.prior, self.target, fraction) for fraction in self.schedule()]

    def forward(self, latent: Tensor, generator: torch.Generator, resampling: Resampling | None = None) -> Paths:
        """Walk paths from ``latent`` ``(B, D)`` to data space, resampled on the way where asked; differentiable."""
        energies = iter(self.energies())
        value, log_ratio = latent, latent.new_zeros(len(latent))
        # What weights had before they were made equal, in units of which the later ones are counted.
        correction = log_ratio if resampling is None else log_ratio.double()
        acceptance, times = list[float](), 0
        for step in self.steps:
            if not isinstance(step, Kernel):
                value, change = step(value)
                log_ratio = log_ratio + change
                continue
            energy = next(energies)
            moved: Moved = step(value, energy, generator)
            value, log_ratio = moved.value, log_ratio + moved.log_ratio
            acceptance.append(_mean(moved.acceptance))
            if resampling is None:
                continue
            log_weights = correction + log_ratio - energy(value) - self.prior.log_prob(latent)
            if resampling.wanted(log_weights):
                chosen = systematic_indices(log_weights, generator)
                correction = (correction - log_weights + log_mean_weight(log_weights))[chosen]
                latent, value, log_ratio = latent[chosen], value[chosen], log_ratio[chosen]
                times += 1
        log_weights = correction + log_ratio - self.target(value) - self.prior.log_prob(latent)
        return Paths(latent, value, log_ratio, log_weights, tuple(acceptance), times)

    def reverse(self, data: Tensor, generator: torch.Generator) -> Paths:
        """Walk paths backward from data ``(B, D)`` to latent space; differentiable."""
        energies = iter(reversed(self.energies()))
        value, log_ratio, acceptance = data, data.new_zeros(len(data)), list[float]()
        for step in reversed(self.steps):
            if isinstance(step, Kernel):
                moved: Moved = step(value, next(energies), generator)
                value, change = moved.value, moved.log_ratio
                acceptance.append(_mean(moved.acceptance))
            else:
                value, change = cast(Bijection, step).inverse(value)
            log_ratio = log_ratio - change
        log_weights = log_ratio - self.target(data) - self.prior.log_prob(value)
        return Paths(value, data, log_ratio, log_weights, tuple(reversed(acceptance)))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator, resampling: Resampling | None = None) -> Paths:
        """Draw paths with their weights.

        Args:
            count: number of paths.
            generator: source of all random numbers.
            resampling: when to resample along the way; never where None. Resampled paths share their beginnings: they are not
                independent, and the effective sample size of their weights does not show it.

        Raises:
            NonFiniteEnergyError: where a weight is NaN or infinite, or all are zero.
        """
        if count < 1:
            raise ConfigurationError(f"the number of paths must be positive, got {count}")
        paths: Paths = self(self.prior.sample(count, generator), generator, resampling)
        refuse_worthless(paths.log_weights)
        return paths


def path_kullback_leibler(flow: StochasticFlow, count: int, generator: torch.Generator) -> Tensor:
    """Return ``J_KL``, the mean of ``-log w`` over ``count`` fresh paths: an upper bound of ``-log Z`` (0-dimensional).

    Raises:
        NonFiniteEnergyError: when it is not finite.
    """
    paths = flow(flow.prior.sample(count, generator), generator)
    return _finite(-paths.log_weights.mean(), "Kullback-Leibler")


def path_likelihood(flow: StochasticFlow, data: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``J_ML``, the mean of ``-log p(y_0) + sum dS`` over backward paths from data ``(B, D)`` (0-dimensional).

    It is an upper bound of the mean negative log-likelihood; without kernels it is equal to it.

    Raises:
        NonFiniteEnergyError: when it is not finite.
    """
    paths = flow.reverse(data, generator)
    return _finite((paths.log_ratio - flow.prior.log_prob(paths.latent)).mean(), "likelihood")


def _finite(loss: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(loss)):
        raise NonFiniteEnergyError(
            f"the {name} loss of a batch of paths is {loss.item()}: an energy along a path is not finite; shorten the steps of "
            "the kernels or lower the learning rate, or give a target that is finite everywhere"
        )
    return loss


def _mean(acceptance: Tensor | None) -> float:
    return float("nan") if acceptance is None else float(acceptance.mean())
