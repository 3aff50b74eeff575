"""Whether a potential fits the particles of a System it is to be added to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError, MoleculeMismatchError
from ....core.potential import Particles

MASS_TOLERANCE = 0.1
"""amu: force fields round masses differently by less than this, and elements differ by more."""


def selected_particles(
    system: openmm.System, molecule: Particles, particles: Sequence[int] | None, replicas: int
) -> list[int]:
    """Return the indices a potential acts on, all of the System's where ``particles`` is None.

    Raises:
        ConfigurationError: for indices that are out of range or repeated.
        MoleculeMismatchError: when there are not ``replicas`` times as many as the potential has.
    """
    expected = replicas * len(molecule)
    total = system.getNumParticles()
    copies = "" if replicas == 1 else f" ({replicas} replicas of {len(molecule)})"
    if particles is None:
        if total != expected:
            raise MoleculeMismatchError(
                f"the potential acts on {expected} particles{copies} but the System has {total}: name the "
                "ones it acts on with particles=, in the order of the potential"
            )
        return list(range(total))
    chosen = [int(index) for index in particles]
    if any(index != given for index, given in zip(chosen, particles, strict=True)):
        raise ConfigurationError("particles must be whole numbers")
    if len(chosen) != expected:
        raise MoleculeMismatchError(
            f"particles names {len(chosen)} particles but the potential acts on {expected}{copies}"
        )
    outside = [index for index in chosen if not 0 <= index < total]
    if outside:
        raise ConfigurationError(f"particle {outside[0]} is outside the System, which has particles 0..{total - 1}")
    repeated = [index for index, count in Counter(chosen).items() if count > 1]
    if repeated:
        raise ConfigurationError(f"particle {repeated[0]} is named more than once in particles")
    return chosen


def check_mechanics(system: openmm.System, chosen: Sequence[int]) -> None:
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


def check_rigidity(system: openmm.System, chosen: Sequence[int]) -> None:
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


def check_elements(topology: app.Topology, molecule: Particles, chosen: Sequence[int], total: int) -> None:
    """Refuse particles whose elements or bonds in ``topology`` are not those of the potential.

    Bonds are compared where both sides know them: each bond of the topology within the chosen particles must
    be one of the potential's, which notices molecules with the same elements in another order.

    Raises:
        MoleculeMismatchError: naming the first particle or bond that differs.
    """
    atoms = list(topology.atoms())
    if len(atoms) != total:
        raise MoleculeMismatchError(f"the topology has {len(atoms)} atoms but the System has {total} particles")
    place = {index: position for position, index in enumerate(chosen)}
    size = len(molecule)
    for index, position in place.items():
        expected = molecule.atomic_numbers[position % size]
        element = atoms[index].element
        if expected == 0 and atoms[index].name == molecule.names[position % size]:
            continue  # a bead: file formats guess elements from names, so the name is what counts
        if (0 if element is None else element.atomic_number) != expected:
            wanted = "no element" if expected == 0 else app.Element.getByAtomicNumber(expected).symbol
            given = "no element" if element is None else element.symbol
            raise MoleculeMismatchError(
                f"particle {index} of the topology ({atoms[index].name} of {atoms[index].residue.name}) has "
                f"{given} where the potential has {wanted}, {molecule.label(position % size)}: the "
                "potential was made for another molecule or another order of its atoms"
            )
    if not molecule.bonds:
        return
    known = {frozenset(bond) for bond in molecule.bonds}
    for bond in topology.bonds():
        i, j = bond.atom1.index, bond.atom2.index
        if i not in place or j not in place:
            continue
        a, b = place[i], place[j]
        if a // size != b // size or frozenset((a % size, b % size)) not in known:
            raise MoleculeMismatchError(
                f"the topology bonds particles {i} ({bond.atom1.name}) and {j} ({bond.atom2.name}), which "
                f"the potential knows as {molecule.label(a % size)} and {molecule.label(b % size)} and does "
                "not bond: the order of the atoms differs"
            )


def check_masses(system: openmm.System, molecule: Particles, chosen: Sequence[int]) -> None:
    """Refuse particles whose masses are not those of the potential: the check left when there is no topology.

    Masses may be shifted from heavy atoms to their hydrogens; each heavy atom must still weigh the same
    together with them. Massless (frozen) particles tell nothing and are left out.

    Raises:
        MoleculeMismatchError: naming the first particle whose mass differs.
    """
    size = len(molecule)
    hydrogens: dict[int, list[int]] = {}
    for i, j in molecule.bonds:
        for heavy, light in ((i, j), (j, i)):
            if molecule.atomic_numbers[light] == 1 and molecule.atomic_numbers[heavy] > 1:
                hydrogens.setdefault(heavy, []).append(light)
    attached = {light for lights in hydrogens.values() for light in lights}
    for start in range(0, len(chosen), size):
        copy = chosen[start : start + size]
        masses = [system.getParticleMass(index).value_in_unit(unit.dalton) for index in copy]
        for head in range(size):
            group = [head, *hydrogens.get(head, [])]
            if head in attached or any(masses[member] == 0 for member in group):
                continue
            given = sum(masses[member] for member in group)
            expected = sum(molecule.masses[member] for member in group)
            if abs(given - expected) > MASS_TOLERANCE:
                raise MoleculeMismatchError(
                    f"particle {copy[head]} (with its hydrogens) weighs {given:.3f} amu but "
                    f"{molecule.label(head)} of the potential weighs {expected:.3f} amu: the potential was "
                    "made for another molecule or another order of its atoms. If only the masses are "
                    "unusual, give topology= and the elements are compared instead"
                )


def check_boundaries(system: openmm.System, molecule: Particles, periodic: bool, chosen: Sequence[int]) -> None:
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
