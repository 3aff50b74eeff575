"""A prior of beads that needs no frames: bonds and angles of an all-atom force field."""

from __future__ import annotations

from typing import Any, NamedTuple

import openmm
from openmm import unit

from ....core.errors import ConfigurationError
from ....forcefields.beads.mappings import Mapping
from ....forcefields.prior_terms import HarmonicAngles, HarmonicBonds, PriorEnergy, PriorTerm


def public_prior(system: openmm.System, mapping: Mapping, temperature: float) -> PriorEnergy:
    """Return the harmonic bonds and angles of a System that lie between beads.

    For force fields that learn from private data: parameters of a published force field reveal nothing about a simulation, in
    contrast to those of :func:`~flowbridge.forcefields.prior_statistics.fit_prior`.

    Args:
        system: System of the atoms with ``HarmonicBondForce`` and ``HarmonicAngleForce``, without constraints, since
            constrained bonds may have no term.
        mapping: mapping to beads of one atom each.
        temperature: temperature of the coarse-grained force field, K.

    Raises:
        ConfigurationError: for beads of several atoms, and for bonded beads without a bond term.
    """
    members = [mapping.members(bead) for bead in range(len(mapping.beads))]
    if any(len(one) != 1 for one in members):
        raise ConfigurationError("a force field has bonds of atoms: a prior made of them is for beads of one atom each")
    bead_of = {int(one[0]): bead for bead, one in enumerate(members)}
    bonds: list[_Row] = []
    angles: list[_Row] = []
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            rows = [force.getBondParameters(n) for n in range(force.getNumBonds())]
            bonds += [_Row.of(bead_of, row[:2], row[2], row[3]) for row in rows if bead_of.keys() >= set(row[:2])]
        elif isinstance(force, openmm.HarmonicAngleForce):
            rows = [force.getAngleParameters(n) for n in range(force.getNumAngles())]
            angles += [_Row.of(bead_of, row[:3], row[3], row[4]) for row in rows if bead_of.keys() >= set(row[:3])]
    missing = {frozenset(pair) for pair in mapping.beads.bonds} - {frozenset(row.beads) for row in bonds}
    if missing:
        pair = sorted(next(iter(missing)))
        raise ConfigurationError(
            f"the System has no harmonic bond between {' and '.join(mapping.beads.label(bead) for bead in pair)}: give one "
            "without constraints between atoms that are beads"
        )
    terms: list[PriorTerm] = [
        HarmonicBonds(
            [row.beads for row in bonds],
            lengths=[row.centre for row in bonds],
            stiffness=[row.stiffness for row in bonds],
        )
    ]
    if angles:
        terms.append(
            HarmonicAngles(
                [row.beads for row in angles], centres=[row.centre for row in angles],
                stiffness=[row.stiffness for row in angles],
            )
        )  # fmt: skip
    return PriorEnergy(mapping.beads, terms, temperature)


class _Row(NamedTuple):
    beads: list[int]
    centre: float
    stiffness: float

    @classmethod
    def of(cls, bead_of: dict[int, int], atoms: list[int], centre: Any, stiffness: Any) -> _Row:
        value, constant = (
            float(quantity.value_in_unit_system(unit.md_unit_system)) for quantity in (centre, stiffness)
        )
        return cls([bead_of[atom] for atom in atoms], value, constant)
