"""The privacy ledger of a trained model, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError
from ...core.model import Model
from ...core.model_files.privacy_statements import DIGEST, tensors_digest
from .budget import Accountant, Neighbours, PrivacyBudget, Release, accountant_name, spent

_FORMAT = 1
_NOT_COVERED = (
    "initial parameters, architecture, clipping norms and other settings, where they were chosen or tuned on the same data",
    "what the model held before training and its data were made with (statistics for standardising, priors, example frames, "
    "force maps), where these come from the same data without a release of their own on this ledger",
    "the number of units, which counts as public",
    "figures of merit computed on the data: losses, accuracies, counts of non-finite contributions",
)
_SEED_POLICY = {
    "cryptographic": "sampling and noise from os.urandom, nothing kept",
    "seeded": "repeatable from a seed, for research: no protection from anyone who knows or guesses the seed",
}


class PrivacyLedger(StrictModel):
    """All releases that made a model, with their total cost.

    Attributes:
        unit: unit of privacy, such as ``trajectory``.
        units: number of units.
        neighbours: relation of data sets.
        epsilon: spent by all releases together.
        delta: delta of the guarantee.
        accountant: accountant of the cost.
        releases: each with its mechanism, noise and clipping.
    """

    format: Literal[1] = 1
    unit: str
    units: PositiveInt
    neighbours: Neighbours
    epsilon: NonNegativeFloat
    delta: float
    accountant: Accountant
    releases: tuple[Release, ...]

    @classmethod
    def of(cls, releases: Sequence[Release], budget: PrivacyBudget, unit: str, units: int) -> Self:
        """Return the ledger of releases, at the budget's delta and by its accountant."""
        cost = spent(releases, budget.delta, budget.neighbours, budget.accountant)
        return cls(
            unit=unit, units=units, neighbours=budget.neighbours, epsilon=cost, delta=budget.delta,
            accountant=budget.accountant, releases=tuple(releases),
        )  # fmt: skip

    @property
    def noise(self) -> Literal["cryptographic", "seeded"]:
        """``seeded`` where any release was."""
        return "seeded" if any(release.noise == "seeded" for release in self.releases) else "cryptographic"

    @property
    def sentence(self) -> str:
        """The guarantee in words."""
        relation = "added or removed" if self.neighbours == "add_remove" else "replaced"
        caveat = (
            "" if self.noise == "cryptographic" else "; its noise is repeatable from a seed: not for others to have"
        )
        return (
            f"({self.epsilon:.4g}, {self.delta:.3g}) differential privacy for each {self.unit}, {relation}, by "
            f"{accountant_name(self.accountant)}{caveat}"
        )

    def statement(self, model: Model) -> dict[str, Any]:
        """Return the ledger as plain data, with the digest of the tensors that it covers."""
        return {
            **self.model_dump(mode="json"),
            "guarantee": self.sentence,
            "accountant_version": accountant_name(self.accountant),
            "seed_policy": _SEED_POLICY[self.noise],
            "not_covered": list(_NOT_COVERED),
            DIGEST: tensors_digest(model),
        }

    def attach(self, model: Model) -> None:
        """Make this the ledger of a model as it is now; model files keep it.

        What is done to a model without looking at the data costs nothing: after such a change, attach the ledger again.
        """
        model.privacy = self.statement(model)


def ledger_of(model: Model) -> PrivacyLedger | None:
    """Return the ledger that a model carries, from training or from its file; None where it has none.

    Raises:
        ConfigurationError: when there is one that this version cannot read.
    """
    if model.privacy is None:
        return None
    known = {name: model.privacy[name] for name in PrivacyLedger.model_fields if name in model.privacy}
    try:
        return PrivacyLedger.model_validate(known)
    except ValidationError as error:
        raise ConfigurationError(
            f"the privacy statement of this model (format {model.privacy.get('format')}) cannot be read, so that further "
            f"training could not be added to it; this flowbridge reads format {_FORMAT}: {error}"
        ) from error


def earlier_releases(
    ledger: PrivacyLedger | None, before: Sequence[Release], unit: str, units: int, budget: PrivacyBudget
) -> list[Release]:
    """Return all releases that a new one is added to, refusing ledgers of another kind.

    The new data count as the same data: releases add up, though on other data they would not have to.

    Args:
        ledger: ledger of the model so far.
        before: further releases, such as those of private statistics; those on the ledger already are not counted twice.
        unit: unit of the new data.
        units: number of units.
        budget: budget of all together.

    Raises:
        ConfigurationError: when unit or neighbours differ.
    """
    budget.refuse_few(units)
    if ledger is None:
        return list(before)
    if (ledger.unit, ledger.neighbours) != (unit, budget.neighbours):
        raise ConfigurationError(
            f"this model has a ledger for each {ledger.unit} under {ledger.neighbours} neighbours; training for each "
            f"{unit} under {budget.neighbours} neighbours cannot be added to it. Go on with the same unit and "
            "neighbours, or start from an untrained model"
        )
    return [*ledger.releases, *before]
