"""What conformance tests found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import FlowbridgeError
from .case import Case


class ConformanceError(FlowbridgeError, AssertionError):
    """A potential, a generator or a transform breaks its contract; the message lists where."""


@dataclass(frozen=True)
class Check:
    """One property of a potential or a generator.

    Attributes:
        name: what was looked at.
        passed: None where it was not run.
        measured: the largest deviation, in the unit that ``detail`` names; None where it is not a number.
        allowed: what it may be.
        detail: the unit, the error that was raised, or why the check was not run.
    """

    name: str
    passed: bool | None
    measured: float | None = None
    allowed: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.passed]
        numbers = "" if self.measured is None else f" {self.measured:.2g} (allowed: {self.allowed:.2g})"
        return f"{mark} {self.name}:{numbers} {self.detail}".rstrip().rstrip(":")


NamedCheck = tuple[str, Callable[[str, Case], Check]]
"""The name of a check, and what makes it."""


@dataclass(frozen=True)
class ConformanceReport:
    """All checks of a potential or a generator, in the order they were made."""

    name: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}, there are {[check.name for check in self.checks]}")

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {check}" for check in self.checks)])

    def require(self) -> None:
        """Raise ConformanceError with all failures, if there are any."""
        if self.failures:
            lines = "\n".join(f"  {check}" for check in self.failures)
            raise ConformanceError(
                f"{self.name}: {len(self.failures)} of {len(self.checks)} conformance checks failed:\n{lines}"
            )


def outcome(name: str, check: Callable[..., Check], *arguments: object) -> Check:
    """Return what ``check(name, *arguments)`` finds; what it raises belongs in the report, next to what else is wrong."""
    try:
        return check(name, *arguments)
    except Exception as error:
        return Check(name, False, detail=f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}")
