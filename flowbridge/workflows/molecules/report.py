"""The page of ``flowbridge build``: one HTML file with a picture of every isomer, which loads nothing."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from ase.data import chemical_symbols
from ase.units import kJ, mol, nm

from ...flows.molecules.formulas import Formula
from ...integrations.rdkit.molecular_graphs import draw_svg
from .ball_and_stick import draw
from .results import FoundIsomer, IsomerResults
from .search import Candidates

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def write_report(found: IsomerResults, candidates: Candidates, formula: Formula, method: str, path: Path) -> None:
    """Write the page.

    Args:
        found: the isomers.
        candidates: what was built.
        formula: that they have.
        method: what evaluated them.
        path: of the HTML file.
    """
    ranked = found.ranked
    lowest = ranked[0].energy if ranked else None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((files(__package__) / "report.html").read_text(encoding="utf-8"))
    page = template.render(
        formula=str(formula).translate(_SUBSCRIPTS),
        method=method,
        built=candidates.built,
        valid_built=candidates.valid,
        relaxed=found.evaluated,
        valid=found.valid,
        evaluations=found.evaluations,
        lowest=lowest,
        novel=sum(isomer.novel for isomer in ranked),
        novel_geometries=sum(isomer.novel_geometry for isomer in ranked),
        faults=[(count, "as built", fault) for fault, count in candidates.faults.most_common()]
        + [(count, "relaxed", fault) for fault, count in found.faults.most_common()],
        isomers=[_entry(isomer, lowest or 0.0) for isomer in ranked],
    )
    part = path.with_name(f".{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


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
