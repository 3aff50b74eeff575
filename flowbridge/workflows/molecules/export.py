"""From a built isomer to the molecule of a Boltzmann generator: what ``flowbridge run`` needs, in three files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openmm
from openmm import app, unit

from ...core.errors import ConfigurationError
from ...integrations.openmm.systems.mmff import mmff_system, mmff_topology
from ...integrations.rdkit.molecular_graphs import molecule_of
from .results import FoundIsomer

_TEMPLATE = """# {smiles}, number {rank} of {formula} by energy. The force field, in the System next to it, is MMFF94.
#
#     flowbridge run {name}.toml

output = "runs/{name}"
seed = 1

[molecule]
name = "{smiles}"
structure = "{name}.pdb"
system = "{name}.xml"
temperature = 300.0
"""


def write_workflows(isomers: Sequence[FoundIsomer], formula: str, folder: Path) -> list[str]:
    """Write a PDB file, a serialised MMFF94 System and a TOML for each isomer, and return SMILES that MMFF94 does not know.

    Args:
        isomers: from the lowest energy to the highest.
        formula: of them all.
        folder: to write into; made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unknown = []
    for rank, isomer in enumerate(isomers, 1):
        molecule = molecule_of(isomer.numbers, isomer.bonds, isomer.positions)
        try:
            system = mmff_system(molecule)
        except ConfigurationError:
            unknown.append(isomer.smiles)
            continue
        name = f"{formula}_{rank:03d}"
        with (folder / f"{name}.pdb").open("w") as file:
            app.PDBFile.writeFile(mmff_topology(molecule), isomer.positions * unit.nanometer, file)
        (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(system))
        text = _TEMPLATE.format(smiles=isomer.smiles.replace("\\", "\\\\"), rank=rank, formula=formula, name=name)
        (folder / f"{name}.toml").write_text(text)
    return unknown
