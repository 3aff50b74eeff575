"""The force field MMFF94 as an OpenMM System, with RDKit's parameters: for any small organic molecule."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError, MissingDependencyError
from .topologies import molecule_topology

try:
    from rdkit import Chem
    from rdkit.Chem import rdForceFieldHelpers
except ImportError as error:
    raise MissingDependencyError("MMFF94 needs RDKit: pip install 'flowbridge[molecules]'") from error

_KCAL = unit.kilocalorie.conversion_factor_to(unit.kilojoule)
_STRETCH = 143.9325  # kcal/mol for a force constant of 1 md/Å at 1 Å
_BEND = 0.043844  # kcal/mol for 1 md Å/rad^2 at one degree
_STRETCH_BEND = 2.51210  # kcal/mol
_COULOMB = 332.0716  # kcal Å/mol
_NEAR_SCALE = 0.75  # of charges three bonds apart
_LINEAR = 179.99  # degrees; the reference angle of atoms that MMFF calls linear


def mmff_system(molecule: Chem.Mol) -> openmm.System:
    """Return MMFF94 of one molecule without cutoff or constraints (Halgren, J. Comput. Chem. 17, 490 (1996), equations 2 to 8).

    Args:
        molecule: molecule with all hydrogens.

    Raises:
        ConfigurationError: when MMFF94 has no parameters for it.
    """
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    if properties is None:
        raise ConfigurationError(
            f"MMFF94 has no parameters for {Chem.MolToSmiles(Chem.RemoveHs(molecule))}: take another force field"
        )
    system = openmm.System()
    for atom in molecule.GetAtoms():
        system.addParticle(app.Element.getByAtomicNumber(atom.GetAtomicNum()).mass.value_in_unit(unit.amu))
    for force in (
        _stretches(molecule, properties),
        *_bends(molecule, properties),
        _out_of_plane(molecule, properties),
        _torsions(molecule, properties),
        _pairs(molecule, properties),
    ):
        system.addForce(force)
    return system


def mmff_topology(molecule: Chem.Mol) -> app.Topology:
    """Return the topology of a molecule as one residue ``MOL``, with unique atom names."""
    symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    return molecule_topology(symbols, bonds, names=[f"{symbol}{index}" for index, symbol in enumerate(symbols, 1)])


def _stretches(molecule: Chem.Mol, properties: Any) -> openmm.Force:
    """Equation 2: quartic, with a cubic constant of -2 per Å."""
    force = openmm.CustomBondForce(f"{0.5 * _STRETCH * _KCAL}*k*d^2*(1-2*d+(7/3)*d^2); d=10*r-r0")
    for name in ("k", "r0"):
        force.addPerBondParameter(name)
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        _, constant, length = properties.GetMMFFBondStretchParams(molecule, i, j)
        force.addBond(i, j, [constant, length])
    return force


def _bends(molecule: Chem.Mol, properties: Any) -> tuple[openmm.Force, openmm.Force, openmm.Force]:
    """Equations 3 to 5: cubic bends, bends of linear atoms, and their coupling to stretches."""
    degrees = f"d=theta*{math.degrees(1.0)}-theta0"
    bend = openmm.CustomAngleForce(f"{0.5 * _BEND * _KCAL}*k*d^2*(1-0.006981317*d); {degrees}")
    linear = openmm.CustomAngleForce(f"{_STRETCH * _KCAL}*k*(1+cos(theta))")
    mixed = openmm.CustomCompoundBondForce(
        3,
        f"{_STRETCH_BEND * _KCAL}*(first*(10*distance(p1,p2)-r1)+second*(10*distance(p2,p3)-r2))"
        f"*(angle(p1,p2,p3)*{math.degrees(1.0)}-theta0)",
    )
    for name in ("k", "theta0"):
        bend.addPerAngleParameter(name)
    linear.addPerAngleParameter("k")
    for name in ("first", "second", "r1", "r2", "theta0"):
        mixed.addPerBondParameter(name)
    for atom in molecule.GetAtoms():
        j = atom.GetIdx()
        for i, k in combinations([n.GetIdx() for n in atom.GetNeighbors()], 2):
            _, constant, angle = properties.GetMMFFAngleBendParams(molecule, i, j, k)
            if angle > _LINEAR:
                linear.addAngle(i, j, k, [constant])
                continue
            bend.addAngle(i, j, k, [constant, angle])
            coupling = properties.GetMMFFStretchBendParams(molecule, i, j, k)
            if coupling is not None:
                lengths = [properties.GetMMFFBondStretchParams(molecule, *pair)[2] for pair in ((i, j), (j, k))]
                mixed.addBond([i, j, k], [*coupling[1:], *lengths, angle])
    return bend, linear, mixed


def _out_of_plane(molecule: Chem.Mol, properties: Any) -> openmm.Force:
    """Equation 6: angles between a bond and the plane of the two others."""
    # The sine of Wilson's angle is the triple product of unit vectors over the sine of the angle between the first two.
    bonds = "; ".join(
        f"{axis}{n}=({axis}{place}-{axis}2)/distance(p{place},p2)"
        for n, place in (("a", 1), ("b", 3), ("c", 4))
        for axis in "xyz"
    )
    force = openmm.CustomCompoundBondForce(
        4,
        f"{0.5 * _BEND * _KCAL}*k*(asin(triple/sin(angle(p1,p2,p3)))*{math.degrees(1.0)})^2; "
        "triple=(ya*zb-za*yb)*xc+(za*xb-xa*zb)*yc+(xa*yb-ya*xb)*zc; " + bonds,
    )
    force.addPerBondParameter("k")
    for atom in molecule.GetAtoms():
        if atom.GetDegree() != 3:
            continue
        j, neighbours = atom.GetIdx(), [n.GetIdx() for n in atom.GetNeighbors()]
        for turn in range(3):
            i, k, out = neighbours[turn], neighbours[(turn + 1) % 3], neighbours[(turn + 2) % 3]
            constant = properties.GetMMFFOopBendParams(molecule, i, j, k, out)
            if constant is not None:
                force.addBond([i, j, k, out], [constant])
    return force


def _torsions(molecule: Chem.Mol, properties: Any) -> openmm.Force:
    """Equation 7."""
    force = openmm.PeriodicTorsionForce()
    for bond in molecule.GetBonds():
        j, k = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        for i in (n.GetIdx() for n in bond.GetBeginAtom().GetNeighbors()):
            for end in (n.GetIdx() for n in bond.GetEndAtom().GetNeighbors()):
                if len({i, j, k, end}) < 4:
                    continue
                found = properties.GetMMFFTorsionParams(molecule, i, j, k, end)
                for periodicity, height in enumerate(found[1:] if found is not None else (), 1):
                    phase = math.pi if periodicity == 2 else 0.0
                    if height:
                        force.addTorsion(i, j, k, end, periodicity, phase, 0.5 * height * _KCAL)
    return force


def _pairs(molecule: Chem.Mol, properties: Any) -> openmm.Force:
    """Equations 8 to 10 of all pairs three bonds apart or more: buffered 14-7, and buffered charges."""
    force = openmm.CustomBondForce(
        f"{_KCAL}*epsilon*(1.07*s/(a+0.07*s))^7*(1.12*s^7/(a^7+0.12*s^7)-2)+{_COULOMB * _KCAL}*charges/(a+0.05); a=10*r"
    )
    for name in ("epsilon", "s", "charges"):
        force.addPerBondParameter(name)
    apart = Chem.GetDistanceMatrix(molecule)
    for i, j in combinations(range(molecule.GetNumAtoms()), 2):
        if apart[i, j] < 3:
            continue
        _, _, size, depth = properties.GetMMFFVdWParams(i, j)
        charges = properties.GetMMFFPartialCharge(i) * properties.GetMMFFPartialCharge(j)
        force.addBond(i, j, [depth, size, charges * (_NEAR_SCALE if apart[i, j] == 3 else 1.0)])
    return force
