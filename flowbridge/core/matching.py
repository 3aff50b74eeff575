"""Whether the particles that an engine has are those that a potential was made for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from .errors import ConfigurationError, MoleculeMismatchError
from .potential import Particles

MASS_TOLERANCE = 0.1
"""amu: force fields round masses differently by less than this, and elements differ by more."""

_ANOTHER = "the potential was made for another molecule or another order of its atoms"


def selected_particles(total: int, molecule: Particles, chosen: Sequence[int] | None, replicas: int) -> list[int]:
    """Return the indices a potential acts on, all of an engine's ``total`` particles where ``chosen`` is None.

    Raises:
        ConfigurationError: for indices that are out of range or repeated.
        MoleculeMismatchError: when there are not ``replicas`` times as many as the potential has.
    """
    expected = replicas * len(molecule)
    copies = "" if replicas == 1 else f" ({replicas} replicas of {len(molecule)})"
    if chosen is None:
        if total != expected:
            raise MoleculeMismatchError(
                f"the potential acts on {expected} particles{copies} but the System has {total}: name the "
                "ones it acts on with particles=, in the order of the potential"
            )
        return list(range(total))
    indices = [int(index) for index in chosen]
    if any(index != given for index, given in zip(indices, chosen, strict=True)):
        raise ConfigurationError("particles must be whole numbers")
    if len(indices) != expected:
        raise MoleculeMismatchError(
            f"particles names {len(indices)} particles but the potential acts on {expected}{copies}"
        )
    outside = [index for index in indices if not 0 <= index < total]
    if outside:
        raise ConfigurationError(f"particle {outside[0]} is outside the System, which has particles 0..{total - 1}")
    repeated = [index for index, count in Counter(indices).items() if count > 1]
    if repeated:
        raise ConfigurationError(f"particle {repeated[0]} is named more than once in particles")
    return indices


def check_particles(
    given: Particles,
    molecule: Particles,
    by: Literal["elements", "masses"] = "elements",
    *,
    replicas: int = 1,
    indices: Sequence[int] | None = None,
    whole: str = "Atoms",
    wording: str = "atom {index} is {element}",
) -> None:
    """Refuse particles that are not ``replicas`` copies of a potential's, one after the other, in its order.

    Elements: a bead, which has none, is known by its name, because file formats guess elements from names. Bonds are compared
    where both sides know them: each bond given must be one of the potential's, which notices molecules with the same elements
    in another order.

    Masses: they may be shifted from heavy atoms to their hydrogens; each heavy atom must still weigh the same together with
    them. Massless (frozen) particles tell nothing and are left out.

    Args:
        given: the engine's particles, in the order in which the potential is to act on them.
        molecule: the potential's.
        by: what is compared.
        replicas: number of copies.
        indices: what the engine calls the particles, in messages; their places in ``given`` where None.
        whole: what the engine calls all of them, in messages.
        wording: how a message about one begins; it may have its ``{index}``, ``{element}``, ``{name}`` and ``{residue}``.

    Raises:
        MoleculeMismatchError: for another number, or naming the first particle or bond that differs.
    """
    if len(given) != replicas * len(molecule):
        raise MoleculeMismatchError(
            f"the potential was made for {replicas * len(molecule)} atoms, the {whole} have {len(given)}"
        )
    indices = range(len(given)) if indices is None else indices
    if by == "masses":
        _check_masses(given, molecule, indices)
    else:
        _check_elements(given, molecule, indices, wording)
        _check_bonds(given, molecule, indices)


def _check_elements(given: Particles, molecule: Particles, indices: Sequence[int], wording: str) -> None:
    size = len(molecule)
    different = [
        place
        for place, number in enumerate(given.atomic_numbers)
        if number != (expected := molecule.atomic_numbers[place % size])
        and (expected != 0 or given.names[place] != molecule.names[place % size])
    ]
    if not different:
        return
    place = different[0]
    found = wording.format(
        index=indices[place],
        element=_element(given.atomic_numbers[place]),
        name=given.names[place],
        residue=given.residue_names[place],
    )
    raise MoleculeMismatchError(
        f"{found} where the potential has {_element(molecule.atomic_numbers[place % size])}, "
        f"{molecule.label(place % size)} ({len(different)} of {len(given)} differ): {_ANOTHER}"
    )


def _check_bonds(given: Particles, molecule: Particles, indices: Sequence[int]) -> None:
    if not molecule.bonds:
        return
    size = len(molecule)
    known = {frozenset(bond) for bond in molecule.bonds}
    for a, b in given.bonds:
        if a // size != b // size or frozenset((a % size, b % size)) not in known:
            raise MoleculeMismatchError(
                f"the topology bonds particles {indices[a]} ({given.names[a]}) and {indices[b]} ({given.names[b]}), which "
                f"the potential knows as {molecule.label(a % size)} and {molecule.label(b % size)} and does "
                "not bond: the order of the atoms differs"
            )


def _check_masses(given: Particles, molecule: Particles, indices: Sequence[int]) -> None:
    size = len(molecule)
    hydrogens: dict[int, list[int]] = {}
    for i, j in molecule.bonds:
        for heavy, light in ((i, j), (j, i)):
            if molecule.atomic_numbers[light] == 1 and molecule.atomic_numbers[heavy] > 1:
                hydrogens.setdefault(heavy, []).append(light)
    attached = {light for lights in hydrogens.values() for light in lights}
    for start in range(0, len(given), size):
        for head in range(size):
            group = [head, *hydrogens.get(head, [])]
            if head in attached or any(given.masses[start + member] == 0 for member in group):
                continue
            found = sum(given.masses[start + member] for member in group)
            expected = sum(molecule.masses[member] for member in group)
            if abs(found - expected) > MASS_TOLERANCE:
                raise MoleculeMismatchError(
                    f"particle {indices[start + head]} (with its hydrogens) weighs {found:.3f} amu but "
                    f"{molecule.label(head)} of the potential weighs {expected:.3f} amu: {_ANOTHER}. If only the masses are "
                    "unusual, give topology= and the elements are compared instead"
                )


def _element(number: int) -> str:
    from .sample_files import ELEMENT_SYMBOLS  # here, because it imports h5py

    return ELEMENT_SYMBOLS[number] if 0 < number < len(ELEMENT_SYMBOLS) else "no element"
