"""The picture of a dissociation: energy and dipole moment against the length of a bond, beside coupled cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from ase.units import Bohr, Debye, Hartree

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen before

_DEBYE = Bohr / Debye  # of one e bohr
_MEASURED, _REFERENCE = "#c8552f", "#2d4a73"


def draw_dissociation(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw what ``electron_densities dissociation`` measured.

    Args:
        points: each with ``length`` in bohr, ``energy`` and ``dipole`` with errors, ``energy_ccsd_t``, ``dipole_ccsd``; atomic
            units.
        file: PNG to write.
    """
    lengths = [point["length"] * Bohr for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), constrained_layout=True)
    zero = min(point["energy_ccsd_t"] for point in points)
    shown = [(point["energy_ccsd_t"] - zero) * Hartree for point in points]
    left.plot(lengths, shown, color=_REFERENCE, marker="o", markersize=4, linewidth=1.2, label="CCSD(T), aug-cc-pVTZ")
    lowest = min(point["energy"][0] for point in points)
    left.errorbar(
        lengths, [(point["energy"][0] - lowest) * Hartree for point in points],
        [point["energy"][1] * Hartree for point in points],
        fmt="s", color=_MEASURED, markersize=5, capsize=3, label="quantum Monte Carlo", zorder=3,
    )  # fmt: skip
    left.set_ylabel("energy above the lowest, eV")
    right.plot(
        lengths, [abs(point["dipole_ccsd"]) * _DEBYE for point in points], color=_REFERENCE, marker="o", markersize=4,
        linewidth=1.2, label="CCSD, aug-cc-pVTZ",
    )  # fmt: skip
    right.errorbar(
        lengths, [abs(point["dipole"][0]) * _DEBYE for point in points], [point["dipole"][1] * _DEBYE for point in points],
        fmt="s", color=_MEASURED, markersize=5, capsize=3, label="quantum Monte Carlo", zorder=3,
    )  # fmt: skip
    right.set_ylabel("dipole moment, D")
    right.set_ylim(bottom=0.0)
    for axes in (left, right):
        axes.set_xlabel("Li-H distance, Å")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
    plt.close(figure)
