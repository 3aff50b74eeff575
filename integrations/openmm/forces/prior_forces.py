"""Prior terms of coarse-grained force fields as OpenMM's own forces."""

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
    """Add the terms of a prior to a System, one native force a term, and return the forces.

    Args:
        system: with the beads among its particles.
        prior: of the beads.
        particles: index of each bead in the System; as they are where None.
        force_group: of all of them.

    Raises:
        ConfigurationError: for another number of particles than beads, or a term that has no native force.
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
    """Add a coarse-grained force field to a System with its prior as native forces and its network alone in Python.

    The energy is that of ``add_potential(system, force_field)``. The network alone is in no file, so that OpenMM can run
    but not serialise it: use ``add_potential`` where a System is to be stored.

    Args:
        system: with the beads among its particles.
        force_field: the force field, or the path of its model file.
        particles: index of each bead in the System.
        force_group: of all forces.
        compilation: see :func:`~flowbridge.integrations.openmm.forces.add_potential`.
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


def _values(term: PriorTerm) -> list[np.ndarray[Any, Any]]:
    return [getattr(term, name).cpu().numpy() for name in term.parameter_names]


def _rows(term: PriorTerm, place: list[int]) -> list[list[int]]:
    return [[place[int(bead)] for bead in row] for row in term.beads]


def _harmonic_bonds(term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for (i, j), length, stiffness in zip(_rows(term, place), *_values(term), strict=True):
        force.addBond(i, j, float(length), float(stiffness))
    return force


def _harmonic_angles(term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for (i, j, k), centre, stiffness in zip(_rows(term, place), *_values(term), strict=True):
        force.addAngle(i, j, k, float(centre), float(stiffness))
    return force


def _pair_force(expression: str, names: tuple[str, ...], term: PriorTerm, place: list[int]) -> openmm.Force:
    force = openmm.CustomBondForce(expression)
    for name in names:
        force.addPerBondParameter(name)
    for (i, j), *values in zip(_rows(term, place), *_values(term), strict=True):
        force.addBond(i, j, [float(value) for value in values])
    return force


def _morse_bonds(term: PriorTerm, place: list[int]) -> openmm.Force:
    return _pair_force("depth*(1-exp(-width*(r-length)))^2", ("length", "depth", "width"), term, place)


def _repulsion(term: PriorTerm, place: list[int]) -> openmm.Force:
    return _pair_force("0.5*stiffness*step(range-r)*(range-r)^2", ("range", "stiffness"), term, place)


def _fourier_torsions(term: PriorTerm, place: list[int]) -> openmm.Force:
    """Return a sum of OpenMM's ``k (1 + cos(n t - phase))``, whose constants are taken out by CustomTorsionForce's formula."""
    count = _values(term)[0].shape[1]
    parts = [f"c{n}*cos({n}*theta)+s{n}*sin({n}*theta)" for n in range(1, count + 1)]
    force = openmm.CustomTorsionForce("+".join(parts))
    for n in range(1, count + 1):
        force.addPerTorsionParameter(f"c{n}")
        force.addPerTorsionParameter(f"s{n}")
    for (i, j, k, m), cosines, sines in zip(_rows(term, place), *_values(term), strict=True):
        pairs = np.stack([cosines, sines], 1).ravel()
        force.addTorsion(i, j, k, m, [float(value) for value in pairs])
    return force


_NATIVE: dict[str, Callable[[PriorTerm, list[int]], openmm.Force]] = {
    "bonds": _harmonic_bonds,
    "morse_bonds": _morse_bonds,
    "angles": _harmonic_angles,
    "torsions": _fourier_torsions,
    "repulsion": _repulsion,
}
