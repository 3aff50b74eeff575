"""The bill: what a trained model says about the privacy of its data, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from ...core.errors import ConfigurationError
from ...core.potential import Potential
from ...core.model_files.privacy_statements import DIGEST, tensors_digest
from ...flows.boltzmann.configuration import Section
from .budget import Accountant, Neighbours, PrivacyBudget, Release, accountant_name, spent

_FORMAT = 1
_NOT_COVERED = (
    "initial parameters, architecture, clipping norms and other settings, where they were chosen or tuned on the same data",
    "what the model held before training and its data were made with (statistics for standardising, priors, example frames, "
    "force maps), where these come from the same data without a release of their own on this bill",
    "the number of units, which counts as public",
    "figures of merit computed on the data: losses, accuracies, counts of non-finite contributions",
)
_SEED_POLICY = {
    "cryptographic": "sampling and noise from os.urandom, nothing kept",
    "seeded": "repeatable from a seed, for research: no protection from anyone who knows or guesses the seed",
}


class PrivacyBill(Section):
    """All releases that a model was made of, with what they cost together.

    Attributes:
        unit: of privacy, such as ``trajectory``.
        units: their number.
        neighbours: relation of data sets.
        epsilon: spent by all releases together.
        delta: at which.
        accountant: which computed it.
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
        """Return the bill of releases, at the budget's delta and by its accountant."""
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

    def statement(self, potential: Potential) -> dict[str, Any]:
        """Return the bill as plain data, with the digest of the tensors that it covers."""
        return {
            **self.model_dump(mode="json"),
            "guarantee": self.sentence,
            "accountant_version": accountant_name(self.accountant),
            "seed_policy": _SEED_POLICY[self.noise],
            "not_covered": list(_NOT_COVERED),
            DIGEST: tensors_digest(potential),
        }

    def attach(self, potential: Potential) -> None:
        """Make this the bill of a potential as it is now; model files keep it.

        What is done to a model without looking at the data costs nothing: after such a change, attach the bill again.
        """
        potential.privacy = self.statement(potential)


def bill_of(potential: Potential) -> PrivacyBill | None:
    """Return the bill that a potential carries, from training or from its file; None where it has none.

    Raises:
        ConfigurationError: when there is one that this version cannot read.
    """
    if potential.privacy is None:
        return None
    known = {name: potential.privacy[name] for name in PrivacyBill.model_fields if name in potential.privacy}
    try:
        return PrivacyBill.model_validate(known)
    except ValidationError as error:
        raise ConfigurationError(
            f"the privacy statement of this model (format {potential.privacy.get('format')}) cannot be read, so that further "
            f"training could not be added to it; this flowbridge reads format {_FORMAT}: {error}"
        ) from error


def earlier_releases(
    bill: PrivacyBill | None, before: Sequence[Release], unit: str, units: int, budget: PrivacyBudget
) -> list[Release]:
    """Return all releases that a new one is added to, refusing bills of another kind.

    The new data count as the same data: releases add up, though on other data they would not have to.

    Args:
        bill: of the model so far.
        before: further releases, such as those of private statistics; those on the bill already are not counted twice.
        unit: of the new data.
        units: their number.
        budget: of all together.

    Raises:
        ConfigurationError: when unit or neighbours differ.
    """
    budget.refuse_few(units)
    if bill is None:
        return list(before)
    if (bill.unit, bill.neighbours) != (unit, budget.neighbours):
        raise ConfigurationError(
            f"this model has a bill for each {bill.unit} under {bill.neighbours} neighbours; training for each {unit} under "
            f"{budget.neighbours} neighbours cannot be added to it. Go on with the same unit and neighbours, or start from an "
            "untrained model"
        )
    return [*bill.releases, *before]
