"""Privacy budgets, releases, and their cost by opacus' accountants."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError, MissingDependencyError

try:
    import opacus
    from opacus.accountants import create_accountant
except ImportError as error:
    raise MissingDependencyError(
        "private training needs opacus for its accountants: pip install 'flowbridge[private]'"
    ) from error

Neighbours = Literal["add_remove", "replace"]
Accountant = Literal["rdp", "prv"]

_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e6
_PRECISION = 3e-3  # relative, of noise multipliers
_STRIDE = 0.85
_HALVINGS = 60


class PrivacyBudget(StrictModel):
    """A guarantee that all releases about the data keep together.

    Attributes:
        epsilon: bound of the change of log-odds of any conclusion when one unit of the data is added or removed.
        delta: probability that they move further; below one over the number of units.
        neighbours: ``add_remove``, data sets that differ by one unit more or less; or ``replace``, by one unit that is
            another. A sum of contributions of norm C at most moves by C in the first case, by 2 C in the second.
        accountant: ``prv`` (Gopi et al., arXiv 2106.02848; tighter) or ``rdp`` (Mironov, arXiv 1702.07476), both of opacus.
    """

    epsilon: float = Field(gt=0.0, allow_inf_nan=False)
    delta: float = Field(gt=0.0, lt=1.0)
    neighbours: Neighbours = "add_remove"
    accountant: Accountant = "prv"

    def refuse_few(self, units: int) -> None:
        """Raise ConfigurationError when delta would allow to publish some unit as it is."""
        if self.delta * units >= 1.0:
            raise ConfigurationError(
                f"delta = {self.delta:g} is no guarantee for {units} units: publishing one of them at random would keep it. "
                f"Take a delta well below 1/{units} = {1.0 / units:.2g}"
            )


class Release(StrictModel):
    """One kind of noisy answers about the data: Gaussian noise on sums over Poisson-sampled units.

    Attributes:
        mechanism: kind of release, such as ``dp_sgd`` or ``means``.
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum under adding or removing a unit.
        sampling_rate: probability with which each unit takes part in an answer.
        steps: number of answers.
        clipping: norms that contributions were clipped to.
        noise: ``cryptographic`` or ``seeded``; see :mod:`~flowbridge.forcefields.private.noise`.
    """

    mechanism: str
    noise_multiplier: PositiveFloat
    sampling_rate: float = Field(gt=0.0, le=1.0)
    steps: PositiveInt
    clipping: dict[str, Any] = Field(default_factory=dict)
    noise: Literal["cryptographic", "seeded"]


def spent(releases: Sequence[Release], delta: float, neighbours: Neighbours, accountant: Accountant) -> float:
    """Return the epsilon of all releases together.

    Under ``replace`` two cases are told apart. Without sampling the sum moves by at most twice as much, which is Gaussian
    noise with half the multiplier, exactly. With Poisson sampling the dominating pair of opacus' accountants is that of
    adding and removing, and doubling its sensitivity is not proven to bound compositions under replacement (Lebeda et al.,
    arXiv 2405.20769). A replacement is one removal and one addition, so the accountant's (e, d) gives (2 e, (1 + exp e) d)
    (group privacy; Dwork and Roth, 2014, theorem 2.2 and lemma 2.2): noise still about doubles, and nothing is taken on trust.

    Args:
        releases: releases in any order; none give 0.
        delta: delta of the guarantee.
        neighbours: relation of data sets.
        accountant: ``rdp`` or ``prv``.
    """
    history = tuple((release.noise_multiplier, release.sampling_rate, release.steps) for release in releases)
    if not history:
        return 0.0
    if neighbours == "add_remove":
        return _accounted(history, delta, accountant)
    if all(rate == 1.0 for _, rate, _ in history):
        return _accounted(tuple((noise / 2.0, rate, steps) for noise, rate, steps in history), delta, accountant)
    return _by_group_privacy(history, delta, accountant)


def noise_multiplier(
    budget: PrivacyBudget, sampling_rate: float, steps: int, before: Sequence[Release] = (), mechanism: str = "training"
) -> float:
    """Return the least noise multiplier with which ``steps`` answers keep the budget after earlier releases.

    Bisection on :func:`spent`, that is, on opacus' accountant; the result is on the safe side by up to 0.3 %.

    Raises:
        ConfigurationError: when the earlier releases leave nothing of the budget, or no noise is enough.
    """
    already = spent(before, budget.delta, budget.neighbours, budget.accountant)
    if already >= budget.epsilon:
        raise ConfigurationError(
            f"the budget epsilon = {budget.epsilon:g} is used up: earlier releases cost {already:.4g} at delta = "
            f"{budget.delta:g}. Nothing more may be learned from these data under it; a larger budget weakens the guarantee of "
            "the earlier models, too"
        )

    def cost(noise: float) -> float:
        new = Release(
            mechanism=mechanism, noise_multiplier=noise, sampling_rate=sampling_rate, steps=steps, noise="seeded"
        )
        return spent([*before, new], budget.delta, budget.neighbours, budget.accountant)

    rough = budget.model_copy(update={"accountant": "rdp"})
    high = 1.0 if budget.accountant == "rdp" else noise_multiplier(rough, sampling_rate, steps, before, mechanism)
    while cost(high) > budget.epsilon:
        high *= 2.0
        if high > _MOST_NOISE:
            raise ConfigurationError(
                f"no noise keeps epsilon = {budget.epsilon:g}, delta = {budget.delta:g} for {steps} steps at sampling rate "
                f"{sampling_rate:g} after earlier releases of {already:.4g}: take fewer steps or a larger budget"
            )
    low = _STRIDE * high
    while low > _LEAST_NOISE and cost(low) <= budget.epsilon:
        low, high = _STRIDE * low, low
    while high / low > 1.0 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= budget.epsilon else (middle, high)
    return high


def accountant_name(accountant: Accountant) -> str:
    """Return the name for ledgers, with the version of opacus."""
    return f"{accountant} (opacus {opacus.__version__})"


@lru_cache(maxsize=4096)
def _accounted(history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    ledger = create_accountant(mechanism=accountant)
    ledger.history = list(history)
    with (
        np.errstate(divide="ignore"),
        warnings.catch_warnings(),
    ):  # log(0) without sampling; bounds that are merely loose
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return float(ledger.get_epsilon(delta=delta))


def _by_group_privacy(history: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    # Any d with (1 + exp e(d)) d <= delta gives a valid epsilon, and a larger d a smaller one: find a large one.
    good, bad, found = 0.0, delta, math.inf
    trial = delta / 4.0
    for _ in range(_HALVINGS):
        half = _accounted(history, trial, accountant)
        if half < 700.0 and (1.0 + math.exp(half)) * trial <= delta:
            good, found = trial, min(found, 2.0 * half)
        else:
            bad = trial
        if good and bad / good < 1.02:
            break
        trial = math.sqrt(good * bad) if good else bad / 4.0
    return found
