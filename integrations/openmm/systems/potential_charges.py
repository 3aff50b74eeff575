"""Charges from an electron density as an OpenMM force field: an XML file that ``openmm.app.ForceField`` reads.

A density determines charges only. Lennard-Jones parameters in the file are those of UFF by element (A. K. Rappe et al., J. Am.
Chem. Soc. 114, 10024, 1992): replace them where your force field has its own, and take bonded terms from it.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike
from openmm import app, unit

from ....core.atomic_files import write_whole
from ....core.errors import ConfigurationError

_DIGITS = 6  # decimals of the charges
# Element: distance of the minimum in Angstrom, depth in kcal/mol.
_UFF = {
    1: (2.886, 0.044), 2: (2.362, 0.056), 3: (2.451, 0.025), 4: (2.745, 0.085), 5: (4.083, 0.180),
    6: (3.851, 0.105), 7: (3.660, 0.069), 8: (3.500, 0.060), 9: (3.364, 0.050), 10: (3.243, 0.042),
}  # fmt: skip


def write_force_field(path: str | os.PathLike[str], topology: app.Topology, charges: ArrayLike) -> None:
    """Write a force field for one residue, with charges of its own and UFF's Lennard-Jones parameters.

    Charges are rounded so that the residue keeps its integer total charge; the first atom takes the remainder.

    Args:
        path: path of the XML file.
        topology: topology of a molecule of one residue, with its bonds, in the order of the charges.
        charges: ``(A,)`` in e.

    Raises:
        ConfigurationError: for several residues, as many charges as there are not atoms, two atoms of one name, or an
            element without parameters.
    """
    atoms = list(topology.atoms())
    values = np.asarray(charges, dtype=np.float64)
    residues = list(topology.residues())
    if len(residues) != 1:
        raise ConfigurationError(f"the topology has {len(residues)} residues: a file is written for a molecule of one")
    if values.shape != (len(atoms),) or not np.isfinite(values).all():
        raise ConfigurationError(f"{len(atoms)} atoms need as many finite charges, got {values}")
    names = [atom.name for atom in atoms]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"atoms of a residue need different names, got {', '.join(names)}")
    rounded = np.round(values, _DIGITS)
    rounded[0] = np.round(rounded[0] + round(float(values.sum())) - rounded.sum(), _DIGITS)
    root = ElementTree.Element("ForceField")
    types = ElementTree.SubElement(root, "AtomTypes")
    residue = ElementTree.SubElement(ElementTree.SubElement(root, "Residues"), "Residue", name=residues[0].name)
    nonbonded = ElementTree.SubElement(root, "NonbondedForce", coulomb14scale="1.0", lj14scale="1.0")
    ElementTree.SubElement(nonbonded, "UseAttributeFromResidue", name="charge")
    for atom, charge in zip(atoms, rounded, strict=True):
        if atom.element is None or atom.element.atomic_number not in _UFF:
            raise ConfigurationError(f"{atom.name} is no element from hydrogen to neon: there are no parameters for it")
        kind = f"{residues[0].name}-{atom.name}"
        ElementTree.SubElement(
            types, "Type", {
                "name": kind, "class": kind, "element": atom.element.symbol,
                "mass": f"{atom.element.mass.value_in_unit(unit.dalton):.6g}",
            },
        )  # fmt: skip
        ElementTree.SubElement(residue, "Atom", name=atom.name, type=kind, charge=f"{charge:.{_DIGITS}f}")
        distance, depth = _UFF[atom.element.atomic_number]
        sigma = (distance * unit.angstrom).value_in_unit(unit.nanometer) / 2 ** (1 / 6)
        epsilon = (depth * unit.kilocalorie_per_mole).value_in_unit(unit.kilojoule_per_mole)
        ElementTree.SubElement(nonbonded, "Atom", type=kind, sigma=f"{sigma:.7g}", epsilon=f"{epsilon:.7g}")
    for bond in topology.bonds():
        ElementTree.SubElement(residue, "Bond", atomName1=bond.atom1.name, atomName2=bond.atom2.name)
    ElementTree.indent(root)
    write_whole(Path(path).absolute(), ElementTree.tostring(root))
