"""Figure of a dissociation: energy and dipole moment against the length of a bond, next to coupled cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase.units import Bohr, Debye, Hartree

from flowbridge.workflows.figure_style import REFERENCE, REWEIGHTED, drawn


def draw_dissociation(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the results of ``electron_densities dissociation``.

    Args:
        points: each with ``length`` in bohr, ``energy`` and ``dipole`` with errors, ``energy_ccsd_t``, ``dipole_ccsd``; atomic
            units.
        file: PNG to write.
    """
    lengths = [point["length"] * Bohr for point in points]
    zero = min(point["energy_ccsd_t"] for point in points)
    lowest = min(point["energy"][0] for point in points)
    debye = Bohr / Debye
    with drawn(file, 3.6) as figure:
        left, right = figure.subplots(1, 2)
        for axes, method, reference, measured in (
            (
                left, "CCSD(T)", [(point["energy_ccsd_t"] - zero) * Hartree for point in points],
                [((point["energy"][0] - lowest) * Hartree, point["energy"][1] * Hartree) for point in points],
            ),
            (
                right, "CCSD", [abs(point["dipole_ccsd"]) * debye for point in points],
                [(abs(point["dipole"][0]) * debye, point["dipole"][1] * debye) for point in points],
            ),
        ):  # fmt: skip
            axes.plot(lengths, reference, "o-", color=REFERENCE, markersize=4, label=f"{method}, aug-cc-pVTZ")
            values, errors = zip(*measured, strict=True)
            axes.errorbar(lengths, values, errors, fmt="s", color=REWEIGHTED, capsize=3, label="quantum Monte Carlo")
            axes.set_xlabel("Li-H distance, Å")
            axes.legend()
        left.set_ylabel("energy above the lowest, eV")
        right.set_ylabel("dipole moment, D")
        right.set_ylim(bottom=0.0)
