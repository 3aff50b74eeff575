"""Run every check on a potential."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.potential import Potential
from .adapters import adapter_checks
from .case import case_of
from .properties import own_checks
from .report import ConformanceReport, outcome

_INVARIANCES = ("translation", "rotation")


def check_potential(
    potential: Potential,
    positions: Tensor | None = None,
    cell: Tensor | None = None,
    *,
    invariances: Iterable[str] = _INVARIANCES,
    configurations: int = 4,
    adapters: bool = True,
    seed: int = 0,
) -> ConformanceReport:
    """Run every conformance check on a potential, and return the report if all is well.

    Checked are shapes and types, forces against finite differences, a batch against its members, repeatability, float32 input,
    global parameters, the invariances, lattice translations of a periodic potential, the round trip through a model file, and
    each adapter at hand: batched energies, ASE, every platform of OpenMM.

    Args:
        potential: on the CPU, in float64 where its numbers are to be compared closely.
        positions: typical configurations ``(B, N, 3)`` or one ``(N, 3)`` in nm; None asks the potential's
            ``example_positions``.
        cell: ``(3, 3)`` or ``(B, 3, 3)`` row vectors in nm, of a periodic potential; None makes a cube.
        invariances: what the energy is to be invariant under, of ``"translation"`` and ``"rotation"``; a density of Cartesian
            coordinates, say, has neither.
        configurations: how many to test at where none are given.
        adapters: whether to go through the engines as well.
        seed: of configurations and random directions.

    Raises:
        ConformanceError: with one line for each check that failed.
        ConfigurationError: for arguments that cannot be used, or a potential without a finite energy where it is tested.
    """
    report = examine_potential(
        potential, positions, cell, invariances=invariances, configurations=configurations, adapters=adapters, seed=seed
    )
    report.require()
    return report


def examine_potential(
    potential: Potential,
    positions: Tensor | None = None,
    cell: Tensor | None = None,
    *,
    invariances: Iterable[str] = _INVARIANCES,
    configurations: int = 4,
    adapters: bool = True,
    seed: int = 0,
) -> ConformanceReport:
    """Return what :func:`check_potential` finds, without raising an error for what fails; arguments as there."""
    wanted = frozenset([invariances] if isinstance(invariances, str) else invariances)
    unknown = sorted(wanted - set(_INVARIANCES))
    if unknown:
        raise ConfigurationError(f"no invariance {unknown[0]!r} is checked, there are {', '.join(_INVARIANCES)}")
    case = case_of(potential, positions, cell, configurations, seed)
    wanted_checks = [*own_checks(case, wanted), *(adapter_checks() if adapters else ())]
    return ConformanceReport(
        type(potential).__name__, tuple(outcome(name, check, case) for name, check in wanted_checks)
    )
