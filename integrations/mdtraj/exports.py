"""Topologies and trajectories of mdtraj from flowbridge's particles and samples.

Import it as ``flowbridge.integrations.mdtraj.exports``; inside, ``import mdtraj`` is the package itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import mdtraj
import numpy as np
from mdtraj.core.element import Element, virtual

from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ...core.samples import WeightedSamples


def topology_from_particles(particles: Particles) -> mdtraj.Topology:
    """Return an mdtraj Topology: one chain, with the residues of the particles.

    Particles without an element (beads) become virtual sites. mdtraj knows only masses of elements: changed masses
    (hydrogen mass repartitioning) are not in the topology.
    """
    topology = mdtraj.Topology()
    chain = topology.add_chain()
    keys = zip(particles.residue_indices, particles.residue_names, strict=True)
    for (number, name), run in groupby(enumerate(keys), key=lambda item: item[1]):
        residue = topology.add_residue(name, chain, resSeq=number + 1)
        for index, _ in run:
            atomic_number = particles.atomic_numbers[index]
            element = Element.getByAtomicNumber(atomic_number) if atomic_number else virtual
            topology.add_atom(particles.names[index], element, residue)
    atoms = list(topology.atoms)
    for i, j in particles.bonds:
        topology.add_bond(atoms[i], atoms[j])
    return topology


def particles_from_mdtraj(topology: mdtraj.Topology, masses: Sequence[float] | None = None) -> Particles:
    """Return the :class:`~flowbridge.core.potential.Particles` of an mdtraj Topology.

    Args:
        topology: topology with names, elements, residues and bonds.
        masses: masses, amu, one per particle; those of the elements where None.

    Raises:
        ConfigurationError: when masses are missing for a particle without an element, or their number is
            wrong.
    """
    atoms = list(topology.atoms)
    numbers = [0 if atom.element is None else int(atom.element.atomic_number) for atom in atoms]
    if masses is None:
        unknown = [atom for atom, number in zip(atoms, numbers, strict=True) if number == 0]
        if unknown:
            raise ConfigurationError(
                f"{len(unknown)} particles have no element, the first is {unknown[0]} "
                f"(index {unknown[0].index}): give masses, one per particle, in amu"
            )
        masses = [atom.element.mass for atom in atoms]
    residues = {residue.index: index for index, residue in enumerate(topology.residues)}
    return Particles(
        names=tuple(atom.name for atom in atoms),
        atomic_numbers=tuple(numbers),
        masses=tuple(float(mass) for mass in masses),
        bonds=tuple((bond.atom1.index, bond.atom2.index) for bond in topology.bonds),
        residue_names=tuple(atom.residue.name for atom in atoms),
        residue_indices=tuple(residues[atom.residue.index] for atom in atoms),
    )


def trajectory_from_samples(samples: WeightedSamples) -> mdtraj.Trajectory:
    """Return the configurations as an mdtraj Trajectory, one frame per sample, in the same order.

    mdtraj stores positions in float32 and no weights: take them from ``samples.weights``.
    """
    positions: np.ndarray[Any, Any] = samples.positions.astype(np.float32)
    return mdtraj.Trajectory(positions, topology_from_particles(samples.particles))
