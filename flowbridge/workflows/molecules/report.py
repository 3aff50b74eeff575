"""What the report of ``flowbridge build`` shows: a picture of every isomer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.units import kJ, mol, nm

from ...flows.molecules.formulas import Formula
from ...integrations.rdkit.molecular_graphs import draw_svg
from ..report import Page, subscripts
from .ball_and_stick import draw
from .results import FoundIsomer


def isomers_page(isomers: Sequence[FoundIsomer], results: Mapping[str, Any], formula: Formula) -> Page:
    """Return the page.

    Args:
        isomers: from the lowest energy to the highest.
        results: what ``results.json`` holds.
        formula: of the isomers.
    """
    lowest = isomers[0].energy if isomers else 0.0
    lead = (
        f"{len(isomers)} isomers. Of {results['built']} molecules that were built {results['valid_as_built']} are valid; of "
        f"each isomer among them one was relaxed with {results['request']['calculator']}, after MMFF94: {results['relaxed']} "
        f"relaxations, {results['valid']} with a valid end, {results['evaluations']} energy evaluations. Energies are relative "
        f"to the lowest, {lowest:.4f} eV. {results['novel']} are new: the builder was not taught with them (green). "
        f"{results['novel_geometries']} have a geometry that it was not taught with. The best geometry of each that was found; "
        "stereoisomers are not told apart."
    )
    faults = [
        (count, when, fault)
        for key, when in (("faults_as_built", "as built"), ("faults", "relaxed"))
        for fault, count in results[key].items()
    ]
    context = {"faults": faults, "isomers": [_entry(isomer, lowest) for isomer in isomers]}
    title = f"Isomers of {subscripts(str(formula))}"
    return Page(title, lead, template="molecules/isomers.html", context=context, hidden=("ranking",))


def _entry(isomer: FoundIsomer, lowest: float) -> dict[str, Any]:
    above = isomer.energy - lowest
    labels = [f"{chemical_symbols[number]}{atom}" for atom, number in enumerate(isomer.numbers)]
    return {
        "smiles": isomer.smiles,
        "novel": isomer.novel,
        "novel_geometry": isomer.novel_geometry,
        "times": isomer.times,
        "above": above,
        "kilojoules": above / (kJ / mol),
        "flat": draw_svg(isomer.smiles),
        "solid": draw(isomer.numbers.tolist(), isomer.positions, isomer.bonds),
        "bonds": [
            {
                "label": f"{labels[i]} – {labels[j]}",
                "order": order,
                "length": float(np.linalg.norm(isomer.positions[i] - isomer.positions[j])) * nm,
            }
            for i, j, order in isomer.bonds
        ],
    }
