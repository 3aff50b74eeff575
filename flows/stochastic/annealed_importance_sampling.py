"""Annealed importance sampling: a stochastic flow without bijections (Neal 2001)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...core.errors import ConfigurationError
from .distributions import Distribution, ReducedEnergy
from .kernels import Kernel
from .stochastic_flow import StochasticFlow


def annealed_importance_sampling(
    prior: Distribution,
    target: ReducedEnergy,
    kernel: Callable[[int], Kernel],
    fractions: Sequence[float] | int,
) -> StochasticFlow:
    """Return a ladder of kernels from the prior to the target, whose path weights are those of annealed importance sampling.

    Args:
        prior: normalised density at the bottom.
        target: reduced energy at the top.
        kernel: makes the kernel of a rung, from its number.
        fractions: fraction of the target's energy on each rung, increasing; or the number of rungs, evenly spaced up to 1.
    """
    if isinstance(fractions, int):
        if fractions < 1:
            raise ConfigurationError(f"a ladder needs at least one rung, got {fractions}")
        fractions = [(number + 1) / fractions for number in range(fractions)]
    return StochasticFlow(prior, target, [kernel(number) for number in range(len(fractions))], fractions)
