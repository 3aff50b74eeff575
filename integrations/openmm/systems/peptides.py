"""Peptides built from their sequence: extended, with all hydrogens, ready for a protein force field."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError, MissingDependencyError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_PHI, _PSI = -120.0, 130.0  # degrees, of a strand


def peptide(sequence: str, pH: float = 7.0) -> tuple[app.Topology, FloatArray]:
    """Return a peptide of L-amino acids as an extended strand with trans peptide bonds.

    The termini are charged, and side chains protonated as usual at the pH. RDKit's distance geometry places heavy atoms,
    OpenMM's Modeller hydrogens; no force field has relaxed them yet. The same sequence gives the same numbers.

    Args:
        sequence: one-letter codes, such as ``YYDPETGTWY`` (chignolin CLN025).
        pH: pH that determines the protonation of side chains.

    Returns:
        The topology, with residues and atoms named as in the Protein Data Bank, and positions ``(N, 3)`` nm.

    Raises:
        ConfigurationError: for other letters, fewer than two residues, or a peptide that RDKit cannot place.
        MissingDependencyError: without RDKit.
    """
    letters = sequence.strip().upper()
    unknown = sorted(set(letters) - set(AMINO_ACIDS))
    if unknown or len(letters) < 2:
        wrong = f"it has {', '.join(map(repr, unknown))}" if unknown else "that is too short"
        raise ConfigurationError(
            f"a sequence is two or more one-letter codes of amino acids ({AMINO_ACIDS}), got {sequence!r}: {wrong}"
        )
    modeller = app.Modeller(*_heavy_atoms(letters))
    # Modeller places hydrogens by Python's own random numbers before it relaxes them.
    state = random.getstate()
    try:
        random.seed(1)
        modeller.addHydrogens(pH=pH, platform=openmm.Platform.getPlatformByName("Reference"))
    finally:
        random.setstate(state)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)


def _heavy_atoms(letters: str) -> tuple[app.Topology, Any]:
    """Return topology and positions of the heavy atoms."""
    try:
        from rdkit import Chem
        from rdkit.Chem import rdDistGeom, rdMolTransforms
    except ImportError as error:
        raise MissingDependencyError(
            "peptides from a sequence need RDKit: pip install 'flowbridge[molecules]'"
        ) from error
    molecule = Chem.AddHs(Chem.MolFromSequence(letters))
    if rdDistGeom.EmbedMolecule(molecule, randomSeed=1, useRandomCoords=True) != 0:
        raise ConfigurationError(
            f"RDKit finds no three-dimensional structure for {letters}: give a PDB file as structure"
        )
    heavy = Chem.RemoveHs(molecule)
    _name_isoleucine(heavy)
    named = {}
    for atom in heavy.GetAtoms():
        label = atom.GetPDBResidueInfo()
        named[label.GetResidueNumber() - 1, label.GetName().strip()] = atom.GetIdx()
    for i in range(len(letters) - 1):
        n, ca, c = (named[i, name] for name in ("N", "CA", "C"))
        next_n, next_ca, next_c = (named[i + 1, name] for name in ("N", "CA", "C"))
        turns = [(n, ca, c, next_n, _PSI), (ca, c, next_n, next_ca, 180.0)]
        if letters[i + 1] != "P":  # the ring of proline fixes phi
            turns.append((c, next_n, next_ca, next_c, _PHI))
        for i_atom, j_atom, k_atom, l_atom, degrees in turns:
            rdMolTransforms.SetDihedralDeg(heavy.GetConformer(), i_atom, j_atom, k_atom, l_atom, degrees)
    file = app.PDBFile(io.StringIO(Chem.MolToPDBBlock(heavy, flavor=4)))
    return file.topology, file.positions


def _name_isoleucine(molecule: Any) -> None:
    """Name the carbon that bears CD1 of isoleucine CG1, as the Protein Data Bank does; RDKit calls it CG2."""
    for atom in molecule.GetAtoms():
        label = atom.GetPDBResidueInfo()
        if label.GetResidueName() != "ILE" or label.GetName().strip() != "CD1":
            continue
        (bearer,) = atom.GetNeighbors()
        (branching,) = (other for other in bearer.GetNeighbors() if other.GetIdx() != atom.GetIdx())
        for gamma in branching.GetNeighbors():
            if gamma.GetPDBResidueInfo().GetName().strip().startswith("CG"):
                gamma.GetPDBResidueInfo().SetName(" CG1" if gamma.GetIdx() == bearer.GetIdx() else " CG2")
