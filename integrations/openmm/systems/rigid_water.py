"""Rigid water in OpenMM: crystals as Systems, and energies with forces on rigid bodies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import openmm
import torch
from openmm import app, unit

from ....core.errors import ConfigurationError
from ....core.potential import Particles
from ....flows.rigid.bodies import BodyConfiguration, RigidBodies
from ....flows.rigid.maps.quaternions import superposition
from ...genice import IceStructure
from ..energies.batched import OpenMMEnergy
from ..forces.particles import particles_from_topology

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_CUTOFF_MARGIN = 1e-5  # nm below half the box, which the minimum image convention asks for


@dataclass(frozen=True)
class RigidWater:
    """Rigid water molecules with their force field.

    Attributes:
        topology: OpenMM topology with virtual sites and box vectors.
        system: OpenMM System whose bonds and angles are constraints.
        bodies: molecules as rigid bodies about their centres of mass, sites in the order of the System.
        configuration: the initial configuration ``(1, M, ...)``.
        box: edges ``(3,)`` nm.
        cutoff: cutoff of non-bonded forces, nm.
    """

    topology: app.Topology
    system: openmm.System
    bodies: RigidBodies
    configuration: BodyConfiguration
    box: FloatArray
    cutoff: float

    @property
    def particles(self) -> Particles:
        """All sites, virtual ones with mass 0."""
        return particles_from_topology(self.topology, self.system)

    @property
    def places(self) -> FloatArray:
        """Positions ``(N, 3)`` nm of all sites in :attr:`configuration`."""
        return self.bodies.places(self.configuration)[0].numpy()


def rigid_water(
    structure: IceStructure,
    force_field: str = "tip4pew.xml",
    *,
    cutoff: float = 1.0,
    method: Literal["PME", "Ewald"] = "PME",
    tolerance: float = 1e-4,
    switch: float | None = 0.9,
) -> RigidWater:
    """Return a crystal of rigid water in its orthorhombic box.

    Args:
        structure: positions and orientations of the molecules.
        force_field: OpenMM XML file of a rigid water model, with or without virtual sites.
        cutoff: cutoff, nm; reduced to just below half the shortest edge of the box where it is longer.
        method: method of electrostatics; ``Ewald`` costs a quarter of ``PME`` for 16 molecules, and more than it for hundreds.
        tolerance: relative error of electrostatic forces.
        switch: fraction of the cutoff at which Lennard-Jones forces begin to be switched off; None cuts them.

    Raises:
        ConfigurationError: when the cell is not orthorhombic, or the force field not one of rigid water.
    """
    box = np.diagonal(structure.cell).copy()
    if not np.allclose(structure.cell, np.diag(box)) or (box <= 0).any():
        raise ConfigurationError(
            f"the cell must be orthorhombic with its edges along x, y and z, got {structure.cell.tolist()} nm"
        )
    field = app.ForceField(force_field)
    topology = _topology(len(structure.positions), box, field)
    # Reduced, as OpenMM refuses a cutoff beyond half the box.
    reach = min(cutoff, box.min() / 2 - _CUTOFF_MARGIN)
    system = field.createSystem(
        topology, nonbondedMethod=getattr(app, method), nonbondedCutoff=reach, rigidWater=True,
        ewaldErrorTolerance=tolerance, switchDistance=None if switch is None else switch * reach,
    )  # fmt: skip
    bodies = rigid_bodies(system, len(structure.positions))
    matrices = torch.as_tensor(structure.rotations)
    # The quaternion of a rotation matrix: the one that superposes the axes.
    orientations = superposition(matrices.mT, torch.eye(3, dtype=torch.float64))
    configuration = BodyConfiguration(torch.as_tensor(structure.positions).unsqueeze(0), orientations.unsqueeze(0))
    return RigidWater(topology, system, bodies, configuration, box, reach)


def _topology(molecules: int, box: FloatArray, field: app.ForceField) -> app.Topology:
    topology = app.Topology()
    chain = topology.addChain()
    oxygen, hydrogen = app.Element.getBySymbol("O"), app.Element.getBySymbol("H")
    for _ in range(molecules):
        residue = topology.addResidue("HOH", chain)
        first = topology.addAtom("O", oxygen, residue)
        for name in ("H1", "H2"):
            topology.addBond(first, topology.addAtom(name, hydrogen, residue))
    topology.setPeriodicBoxVectors(np.diag(box) * unit.nanometer)
    modeller = app.Modeller(topology, np.zeros((3 * molecules, 3)) * unit.nanometer)
    modeller.addExtraParticles(field)
    return modeller.topology


def rigid_bodies(system: openmm.System, count: int) -> RigidBodies:
    """Return the rigid bodies of a System of ``count`` equal three-atom molecules with virtual sites.

    In their frame the bisector of the hydrogens is along z and the hydrogens are along y; its origin is the centre of mass.

    Raises:
        ConfigurationError: when the constraints of the first molecule do not fix its three atoms, in the order O, H, H.
    """
    total = system.getNumParticles()
    sites, rest = divmod(total, count)
    distances = {}
    for index in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(index)
        distances[min(i, j), max(i, j)] = length.value_in_unit(unit.nanometer)
    missing = [pair for pair in ((0, 1), (0, 2), (1, 2)) if pair not in distances]
    if rest or missing:
        raise ConfigurationError(
            f"{total} particles are not {count} rigid molecules O, H, H with virtual sites after them"
            + (f": no constraint between {missing[0]}" if missing else "")
        )
    bond, other, across = distances[0, 1], distances[0, 2], distances[1, 2]
    if not math.isclose(bond, other, rel_tol=1e-6) or across >= 2 * bond:
        raise ConfigurationError(f"distances {bond}, {other} and {across} nm are not those of a water molecule")
    height = math.sqrt(bond**2 - across**2 / 4)
    places = np.zeros((total, 3))
    places[1], places[2] = (0.0, across / 2, height), (0.0, -across / 2, height)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(places)
    context.computeVirtualSites()
    template = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)[:sites]
    masses = [system.getParticleMass(index).value_in_unit(unit.dalton) for index in range(sites)]
    return RigidBodies.centred(torch.from_numpy(template), torch.tensor(masses), count)


class RigidSystemEnergy:
    """Batched energies of a System whose virtual sites the caller places, as in rigid bodies.

    OpenMM adds the force of a virtual site to the atoms that it depends on and reports it for the site as well: here the forces
    of sites are zero, so that the forces of a body sum to its total force, and their moments to its torque. A
    :class:`~flowbridge.core.energy.BatchedEnergy`.

    Args:
        system: the System.
        platform: see :class:`~flowbridge.integrations.openmm.energies.batched.OpenMMEnergy`.
        workers: see the same class.
    """

    def __init__(self, system: openmm.System, platform: str | None = None, workers: int | None = None) -> None:
        self.energy = OpenMMEnergy(system, platform, workers)
        self._virtual = np.array([system.isVirtualSite(index) for index in range(system.getNumParticles())])

    def energies(self, positions: FloatArray) -> FloatArray:
        """Return energies ``(B,)`` in kJ/mol without evaluating forces."""
        return self.energy.energies(positions)

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See :meth:`flowbridge.core.energy.BatchedEnergy.energies_and_forces`."""
        energies, forces = self.energy.energies_and_forces(positions)
        forces[:, self._virtual] = 0.0
        return energies, forces
