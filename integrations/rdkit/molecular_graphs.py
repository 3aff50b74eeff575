"""RDKit: SMILES, structures from SMILES, and pictures of molecules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import units
from numpy.typing import NDArray

from ...core.errors import ConfigurationError, CoordinateError, MissingDependencyError
from ...flows.molecules.bonds import Bond

try:
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
    from rdkit.Chem.Draw import rdMolDraw2D
    from rdkit.rdBase import BlockLogs
except ImportError as error:
    raise MissingDependencyError("molecular graphs need RDKit: pip install 'flowbridge[molecules]'") from error

BOND_TYPES = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
_ATTEMPTS = 20  # to embed a molecule
_ITERATIONS = 2000  # of a relaxation by MMFF94
_ANGSTROM = units.Angstrom / units.nm
_KILOCALORIE = units.kcal / units.kJ


class Structure(NamedTuple):
    """Atomic numbers ``(N,)`` and positions ``(N, 3)`` in nm, hydrogens last."""

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]


def canonical_smiles(numbers: Iterable[int], bonds: Iterable[Bond]) -> str:
    """Return the canonical SMILES, without stereochemistry, of a molecule given by its atoms and bonds.

    Raises:
        CoordinateError: when RDKit refuses the graph.
    """
    return Chem.MolToSmiles(Chem.RemoveHs(molecule_of(numbers, bonds)))


def molecule_of(
    numbers: Iterable[int], bonds: Iterable[Bond], positions: NDArray[np.float64] | None = None
) -> Chem.Mol:
    """Return an RDKit molecule with all hydrogens, and a conformer of the positions ``(N, 3)`` in nm, if given.

    Raises:
        CoordinateError: when RDKit refuses the graph.
    """
    molecule = Chem.RWMol()
    for number in numbers:
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
    for i, j, order in bonds:
        molecule.AddBond(int(i), int(j), BOND_TYPES[order])
    try:
        Chem.SanitizeMol(molecule)
    except (Chem.KekulizeException, Chem.AtomValenceException) as error:
        raise CoordinateError(f"RDKit refuses the molecule: {error}") from error
    if positions is not None:
        conformer = Chem.Conformer(molecule.GetNumAtoms())
        conformer.SetPositions(np.ascontiguousarray(positions, dtype=float) / _ANGSTROM)
        molecule.AddConformer(conformer)
    return molecule.GetMol()


def embed(smiles: str, seed: int) -> Structure:
    """Return a structure of a SMILES string, by distance geometry and, if it has parameters, MMFF94.

    Raises:
        ConfigurationError: for an invalid SMILES string.
        CoordinateError: when no structure is found.
    """
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise ConfigurationError(f"RDKit cannot read the SMILES {smiles!r}")
    molecule = Chem.AddHs(parsed)  # hydrogens come after the other atoms
    with BlockLogs():
        if rdDistGeom.EmbedMolecule(molecule, randomSeed=seed, maxAttempts=_ATTEMPTS) != 0:
            raise CoordinateError(f"RDKit finds no three-dimensional structure for {smiles!r}")
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
            rdForceFieldHelpers.MMFFOptimizeMolecule(molecule)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    return Structure(numbers, np.array(molecule.GetConformer().GetPositions()) * _ANGSTROM)


class RelaxedByMMFF(NamedTuple):
    """Positions ``(N, 3)`` in nm, and the energy of MMFF94 in kJ/mol; None where it lacks parameters.

    The energy ranks geometries of one graph; energies of different graphs cannot be compared.
    """

    positions: NDArray[np.float64]
    energy: float | None


def relax_mmff(numbers: Iterable[int], bonds: Iterable[Bond], positions: NDArray[np.float64]) -> RelaxedByMMFF:
    """Return the nearest minimum of MMFF94; the given positions where it lacks parameters.

    Raises:
        CoordinateError: when RDKit refuses the graph.
    """
    molecule = molecule_of(numbers, bonds, positions)
    with BlockLogs():
        if not rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
            return RelaxedByMMFF(positions, None)
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties)
        field.Minimize(maxIts=_ITERATIONS)
        energy = field.CalcEnergy() * _KILOCALORIE
    return RelaxedByMMFF(np.array(molecule.GetConformer().GetPositions()) * _ANGSTROM, energy)


def draw_svg(smiles: str) -> str:
    """Return a picture of a molecule as SVG for HTML pages; raises ConfigurationError for an invalid SMILES string."""
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ConfigurationError(f"RDKit cannot read the SMILES {smiles!r}")
    drawer = rdMolDraw2D.MolDraw2DSVG(200, 150)
    options: Any = drawer.drawOptions()
    options.clearBackground = False
    options.fixedBondLength = 28.0
    rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule)
    drawer.FinishDrawing()
    text: str = drawer.GetDrawingText()
    return text[text.index("<svg") :]


def write_sdf(path: str, molecules: Sequence[tuple[Chem.Mol, dict[str, str | float]]]) -> None:
    """Write molecules with their conformers and named values to an SDF file."""
    with Chem.SDWriter(path) as writer:
        for molecule, values in molecules:
            copy = Chem.Mol(molecule)
            for name, value in values.items():
                copy.SetProp(name, str(value))
            writer.write(copy)
