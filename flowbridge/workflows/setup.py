"""From the ``[molecule]`` table to an OpenMM system."""

from __future__ import annotations

from pathlib import Path

from ..integrations.openmm.energies import OpenMMEnergy
from ..integrations.openmm.systems import MolecularSystem, load_system
from .configuration import Workflow


def molecular_system(workflow: Workflow, folder: Path) -> MolecularSystem:
    """Return the molecule of a workflow; relative paths start at ``folder``, where its TOML lies."""
    molecule = workflow.molecule
    return load_system(
        structure=molecule.structure,
        smiles=molecule.smiles,
        force_field=molecule.force_field,
        system_file=molecule.system,
        folder=folder,
    )


def batched_energy(workflow: Workflow, molecule: MolecularSystem) -> OpenMMEnergy:
    """Return an evaluator of the molecule's energies, whose plan is settled: work that is resumed gives the same numbers."""
    energy = OpenMMEnergy(molecule.system, workers=workflow.workers)
    energy.settle(molecule.positions[None])
    return energy
