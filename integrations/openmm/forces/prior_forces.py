"""Prior terms of coarse-grained force fields as native forces of OpenMM."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openmm

from ....core.errors import ConfigurationError
from ....forcefields.coarse_grained_force_field import CoarseGrainedForceField
from ....forcefields.prior_terms import PriorEnergy, PriorTerm
from .add_potential import add_potential


def add_prior_forces(
    system: openmm.System, prior: PriorEnergy, *, particles: Sequence[int] | None = None, force_group: int = 0
) -> list[openmm.Force]:
    """Add the terms of a prior to a System, one native force per term, and return the forces.

    Args:
        system: System with the beads among its particles.
        prior: prior of the beads.
        particles: index of each bead in the System; 0, 1, ... where None.
        force_group: force group of all of them.

    Raises:
        ConfigurationError: for a wrong number of particles, or a term without a native force.
    """
    beads = len(prior.metadata.particles)
    place = list(range(beads)) if particles is None else [int(index) for index in particles]
    if len(place) != beads or max(place) >= system.getNumParticles():
        raise ConfigurationError(
            f"the prior is of {beads} beads, got {len(place)} particles of a System with {system.getNumParticles()}"
        )
    forces = []
    for term in prior.prior_terms:
        if term.kind not in _NATIVE:
            raise ConfigurationError(
                f"the prior term {term.kind!r} has no native force: add the prior by add_potential"
            )
        force = _NATIVE[term.kind](term, place)
        force.setName(f"Prior {term.kind}")
        force.setForceGroup(force_group)
        system.addForce(force)
        forces.append(force)
    return forces


def add_coarse_grained_force_field(
    system: openmm.System,
    force_field: CoarseGrainedForceField | str | os.PathLike[str],
    *,
    particles: Sequence[int] | None = None,
    force_group: int = 0,
    compilation: str = "auto",
) -> list[openmm.Force]:
    """Add a coarse-grained force field to a System, its prior as native forces and only its network in Python.

    The energy is that of ``add_potential(system, force_field)``. The network alone is in no file, so OpenMM can run it but not
    serialise it: use ``add_potential`` for a System that is to be stored.

    Args:
        system: System with the beads among its particles.
        force_field: force field, or the path of its model file.
        particles: index of each bead in the System; 0, 1, ... where None.
        force_group: force group of all forces.
        compilation: compilation mode; see :func:`~flowbridge.integrations.openmm.forces.add_potential`.
    """
    model = CoarseGrainedForceField.of(force_field)
    forces = add_prior_forces(system, model.prior, particles=particles, force_group=force_group)
    if model.network is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this potential is in no model file")  # said above
            network = add_potential(
                system, model.network_only(), particles=particles, force_group=force_group, compilation=compilation
            )
        forces.append(network)
    return forces


def _rows(term: PriorTerm, place: list[int]) -> list[list[Any]]:
    """Return for each entry of a term its particles, then its parameters."""
    parameters = [getattr(term, name).cpu().numpy() for name in term.parameter_names]
    return [
        [place[int(bead)] for bead in beads] + [float(value) for value in np.hstack(values)]
        for beads, *values in zip(term.beads, *parameters, strict=True)
    ]


def _harmonic_bonds(term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for row in _rows(term, place):
        force.addBond(*row)
    return force


def _harmonic_angles(term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for row in _rows(term, place):
        force.addAngle(*row)
    return force


def _pair_force(expression: str, names: tuple[str, ...], term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.CustomBondForce(expression)
    for name in names:
        force.addPerBondParameter(name)
    for i, j, *values in _rows(term, place):
        force.addBond(i, j, values)
    return force


def _morse_bonds(term: PriorTerm, place: list[int]) -> openmm.Force:
    return _pair_force("depth*(1-exp(-width*(r-length)))^2", ("length", "depth", "width"), term, place)


def _repulsion(term: PriorTerm, place: list[int]) -> openmm.Force:
    return _pair_force("0.5*stiffness*step(range-r)*(range-r)^2", ("range", "stiffness"), term, place)


def _fourier_torsions(term: PriorTerm, place: list[int]) -> openmm.Force:
    """Return Fourier series without the constants that OpenMM's ``k (1 + cos(n t - phase))`` would add."""
    orders = range(1, term.get_buffer("cosines").shape[1] + 1)
    force = openmm.CustomTorsionForce("+".join(f"c{n}*cos({n}*theta)+s{n}*sin({n}*theta)" for n in orders))
    for letter in "cs":
        for n in orders:
            force.addPerTorsionParameter(f"{letter}{n}")
    for i, j, k, m, *values in _rows(term, place):
        force.addTorsion(i, j, k, m, values)
    return force


_NATIVE: dict[str, Callable[[PriorTerm, list[int]], openmm.Force]] = {
    "bonds": _harmonic_bonds,
    "morse_bonds": _morse_bonds,
    "angles": _harmonic_angles,
    "torsions": _fourier_torsions,
    "repulsion": _repulsion,
}
