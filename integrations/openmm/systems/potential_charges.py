"""Charges from an electron density as an OpenMM force field: an XML file that ``openmm.app.ForceField`` reads.

What a density gives are charges. Lennard-Jones parameters in the file are those of UFF by element (A. K. Rappe et al., J. Am.
Chem. Soc. 114, 10024, 1992), to be replaced where the force field at hand has its own; bonded terms are left to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike
from openmm import app, unit

from ....core.errors import ConfigurationError

# Element: distance of the minimum in Angstrom, depth in kcal/mol.
_UFF = {
    1: (2.886, 0.044), 2: (2.362, 0.056), 3: (2.451, 0.025), 4: (2.745, 0.085), 5: (4.083, 0.180),
    6: (3.851, 0.105), 7: (3.660, 0.069), 8: (3.500, 0.060), 9: (3.364, 0.050), 10: (3.243, 0.042),
}  # fmt: skip


def write_force_field(
    path: str | os.PathLike[str], topology: app.Topology, charges: ArrayLike, *, digits: int = 6
) -> None:
    """Write a force field for one residue, with charges of its own and UFF's Lennard-Jones parameters.

    Charges are rounded so that the residue keeps its whole total charge; what rounding leaves goes to the first atom.

    Args:
        path: of the XML file.
        topology: of a molecule that is one residue, with its bonds, in the order of the charges.
        charges: ``(A,)`` in e.
        digits: decimals of the charges.

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
    rounded = np.round(values, digits)
    rounded[0] = np.round(rounded[0] + round(float(values.sum())) - rounded.sum(), digits)
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
        ElementTree.SubElement(residue, "Atom", name=atom.name, type=kind, charge=f"{charge:.{digits}f}")
        distance, depth = _UFF[atom.element.atomic_number]
        sigma = (distance * unit.angstrom).value_in_unit(unit.nanometer) / 2 ** (1 / 6)
        epsilon = (depth * unit.kilocalorie_per_mole).value_in_unit(unit.kilojoule_per_mole)
        ElementTree.SubElement(nonbonded, "Atom", type=kind, sigma=f"{sigma:.7g}", epsilon=f"{epsilon:.7g}")
    for bond in topology.bonds():
        ElementTree.SubElement(residue, "Bond", atomName1=bond.atom1.name, atomName2=bond.atom2.name)
    ElementTree.indent(root)
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    ElementTree.ElementTree(root).write(part, encoding="unicode")
    part.replace(target)


def topology_of(symbols: Sequence[str], bonds: Sequence[tuple[int, int]], residue: str = "MOL") -> app.Topology:
    """Return the topology of one molecule: atoms named by symbol and number, such as O1, H1, H2.

    Args:
        symbols: chemical symbols.
        bonds: pairs of indices.
        residue: name of the residue.
    """
    topology = app.Topology()
    chain = topology.addChain()
    one = topology.addResidue(residue, chain)
    counts: dict[str, int] = {}
    atoms = []
    for symbol in symbols:
        counts[symbol] = counts.get(symbol, 0) + 1
        atoms.append(topology.addAtom(f"{symbol}{counts[symbol]}", app.Element.getBySymbol(symbol), one))
    for first, second in bonds:
        topology.addBond(atoms[first], atoms[second])
    return topology
