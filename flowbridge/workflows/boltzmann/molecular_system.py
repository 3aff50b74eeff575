"""From the ``[molecule]`` table to an OpenMM system."""

from __future__ import annotations

from pathlib import Path

from ...integrations.openmm.systems.input_files import MolecularSystem, load_system
from .configuration import Workflow


def molecular_system(workflow: Workflow, folder: Path) -> MolecularSystem:
    """Return the molecule of a workflow; relative paths start at ``folder``, where its TOML lies."""
    molecule = workflow.molecule
    return load_system(
        structure=molecule.structure,
        smiles=molecule.smiles,
        sequence=molecule.sequence,
        force_field=molecule.force_field,
        system_file=molecule.system,
        folder=folder,
    )
