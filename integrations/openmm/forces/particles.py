"""Particles of an OpenMM topology, as in potentials and model files."""

from __future__ import annotations

from collections.abc import Sequence

import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError
from ....core.potential import Particles


def particles_from_topology(
    topology: app.Topology, system: openmm.System | None = None, chosen: Sequence[int] | None = None
) -> Particles:
    """Return the :class:`~flowbridge.core.potential.Particles` of ``topology``.

    Args:
        topology: OpenMM topology with bonds.
        system: System with the masses; element masses where None.
        chosen: indices of the wanted particles, in this order; all where None.

    Raises:
        ConfigurationError: when a topology without a System has an atom without an element (its mass is unknown).
    """
    atoms = list(topology.atoms())
    if chosen is not None:
        atoms = [atoms[index] for index in chosen]
    masses = []
    for atom in atoms:
        if system is not None:
            masses.append(system.getParticleMass(atom.index).value_in_unit(unit.dalton))
        elif atom.element is not None:
            masses.append(atom.element.mass.value_in_unit(unit.dalton))
        else:
            raise ConfigurationError(f"atom {atom.index} ({atom.name}) has no element: give the System for its mass")
    place = {atom.index: position for position, atom in enumerate(atoms)}
    ends = ((bond.atom1.index, bond.atom2.index) for bond in topology.bonds())
    residues = {residue: index for index, residue in enumerate(topology.residues())}
    return Particles(
        names=tuple(atom.name for atom in atoms),
        atomic_numbers=tuple(0 if atom.element is None else atom.element.atomic_number for atom in atoms),
        masses=tuple(masses),
        bonds=tuple((place[i], place[j]) for i, j in ends if i in place and j in place),
        residue_names=tuple(atom.residue.name for atom in atoms),
        residue_indices=tuple(residues[atom.residue] for atom in atoms),
    )


def particles_from_system(system: openmm.System, chosen: Sequence[int]) -> Particles:
    """Return particles of which nothing but the masses is known."""
    masses = tuple(system.getParticleMass(index).value_in_unit(unit.dalton) for index in chosen)
    return Particles(names=("",) * len(masses), atomic_numbers=(0,) * len(masses), masses=masses)
