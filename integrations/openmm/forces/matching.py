"""Whether a potential fits the particles of a System it is to be added to."""

from __future__ import annotations

from collections.abc import Sequence

import openmm
from openmm import app

from ....core.errors import ConfigurationError, MoleculeMismatchError
from ....core.matching import check_particles, selected_particles
from ....core.potential import Particles, PotentialMetadata
from .particles import particles_from_system, particles_from_topology


def matching_particles(
    system: openmm.System,
    metadata: PotentialMetadata,
    topology: app.Topology | None,
    particles: Sequence[int] | None,
    replicas: int = 1,
) -> list[int]:
    """Return the indices that a potential acts on, after everything about them was compared with its metadata.

    Args:
        system: the System that holds the particles.
        metadata: the potential's.
        topology: where elements and bonds are compared; without it masses are.
        particles: indices in the potential's order; all where None.
        replicas: number of copies of the molecule.

    Raises:
        MoleculeMismatchError: when number, elements, bonds or masses of the particles are not the potential's.
        ConfigurationError: for indices, constraints, virtual sites or boundaries that the potential cannot act on.
    """
    molecule, total = metadata.particles, system.getNumParticles()
    chosen = selected_particles(total, molecule, particles, replicas)
    if metadata.rigid:
        _check_rigidity(system, chosen)
    else:
        _check_mechanics(system, chosen)
    if topology is None:
        check_particles(particles_from_system(system, chosen), molecule, "masses", replicas=replicas, indices=chosen)
    elif topology.getNumAtoms() != total:
        raise MoleculeMismatchError(
            f"the topology has {topology.getNumAtoms()} atoms but the System has {total} particles"
        )
    else:
        wording = "particle {index} of the topology ({name} of {residue}) has {element}"
        given = particles_from_topology(topology, system, chosen)
        check_particles(given, molecule, replicas=replicas, indices=chosen, wording=wording)
    _check_boundaries(system, molecule, metadata.periodic, chosen)
    return chosen


def _check_mechanics(system: openmm.System, chosen: Sequence[int]) -> None:
    """Refuse constraints between and virtual sites among the chosen particles (ConfigurationError)."""
    inside = set(chosen)
    constrained = []
    for index in range(system.getNumConstraints()):
        i, j, _ = system.getConstraintParameters(index)
        if i in inside and j in inside:
            constrained.append((i, j))
    if constrained:
        raise ConfigurationError(
            f"the System constrains {len(constrained)} distances between particles of the potential, first "
            f"{constrained[0]}: a potential that samples every bond cannot act on them. Create the System "
            "with constraints=None and rigidWater=False (and a time step of 1 fs or less), or remove them "
            "with System.removeConstraint"
        )
    for index in chosen:
        if system.isVirtualSite(index):
            raise ConfigurationError(
                f"particle {index} is a virtual site: its position follows from other particles, so a "
                "potential cannot act on it as on a free one"
            )


def _check_rigidity(system: openmm.System, chosen: Sequence[int]) -> None:
    """Refuse particles among the chosen that nothing holds (ConfigurationError): the potential is of rigid bodies."""
    held = {index for index in chosen if system.isVirtualSite(index)}
    for index in range(system.getNumConstraints()):
        held.update(system.getConstraintParameters(index)[:2])
    free = [index for index in chosen if index not in held]
    if free:
        raise ConfigurationError(
            f"the potential is of rigid bodies, but {len(free)} of its particles are neither constrained nor virtual sites, "
            f"the first is {free[0]}: create the System with rigidWater=True, or constrain the distances within each body"
        )


def _check_boundaries(system: openmm.System, molecule: Particles, periodic: bool, chosen: Sequence[int]) -> None:
    """Refuse a potential whose idea of the periodic box contradicts the System's (ConfigurationError).

    A potential of an open molecule needs it whole. OpenMM wraps and scales (barostat) molecules, which it
    knows by the bonds and constraints of the System, so these must join the particles when the System is
    periodic.
    """
    if periodic:
        for force in system.getForces():
            if isinstance(force, (openmm.NonbondedForce, openmm.CustomNonbondedForce)) and (
                not force.usesPeriodicBoundaryConditions()
            ):
                raise ConfigurationError(
                    f"the potential is periodic but the System's {force.getName()} is not: create the "
                    "System with a periodic nonbondedMethod, or use a potential of the open molecule"
                )
        return
    if not system.usesPeriodicBoundaryConditions():
        return
    parent = list(range(system.getNumParticles()))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for i, j in _joined_pairs(system):
        parent[root(i)] = root(j)
    size = len(molecule)
    for position, index in enumerate(chosen):
        first = chosen[position - position % size]
        if root(index) != root(first):
            raise ConfigurationError(
                f"the System is periodic, the potential is not, and no chain of bonds in the System joins "
                f"particles {first} and {index}: OpenMM may move them to different images, or scale them "
                "apart under a barostat. Add an openmm.HarmonicBondForce with force constant 0 along the "
                "bonds of the molecule"
            )


def _joined_pairs(system: openmm.System) -> list[tuple[int, int]]:
    pairs = []
    for index in range(system.getNumConstraints()):
        i, j, _ = system.getConstraintParameters(index)
        pairs.append((i, j))
    for force in system.getForces():
        if isinstance(force, (openmm.HarmonicBondForce, openmm.CustomBondForce)):
            for index in range(force.getNumBonds()):
                i, j, *_ = force.getBondParameters(index)
                pairs.append((i, j))
    return pairs
