"""Starting structures of the training trajectories: named in the TOML, or found automatically."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import networkx
import numpy as np
import torch

from ...core.errors import ConfigurationError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...core.potential import Particles
from ...core.units import thermal_energy
from ...flows.boltzmann.internal_coordinates import InternalCoordinates
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.energies.batched import OpenMMEnergy
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.sampling.steering import SteeringRun, Torsion, run_steering
from ...integrations.openmm.systems.input_files import MolecularSystem
from .configuration import Workflow

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_TRIES = 6  # random starts for each basin that is asked for
_SAME = math.radians(40.0)  # two minima closer than this in every torsion are one basin
_HIGHEST = 12.0  # kT above the best minimum


@dataclass(frozen=True)
class Start:
    """A starting structure with how much to simulate from it."""

    name: str
    positions: FloatArray
    trajectories: int
    frames: int


def starting_structures(workflow: Workflow, molecule: MolecularSystem, executor: Executor) -> list[Start]:
    """Return one start a basin."""
    if workflow.simulate.basins:
        return _named(workflow, molecule, executor)
    return _automatic(workflow, molecule, executor)


def _named(workflow: Workflow, molecule: MolecularSystem, executor: Executor) -> list[Start]:
    runs = []
    for number, basin in enumerate(workflow.simulate.basins):
        torsions = tuple(molecule.torsion_atoms(workflow.molecule.torsions[name]) for name in basin.torsions)
        angles = tuple(math.radians(angle) for angle in basin.torsions.values())
        runs.append(_steering(workflow, molecule, number, torsions, angles, minimise=False))
    made = dict(track(executor(run_steering, runs), "starting structures", len(runs)))
    return [
        Start(basin.name, made[number], basin.trajectories, basin.frames or workflow.simulate.frames)
        for number, basin in enumerate(workflow.simulate.basins)
    ]


def _steering(
    workflow: Workflow,
    molecule: MolecularSystem,
    number: int,
    torsions: tuple[Torsion, ...],
    angles: tuple[float, ...],
    minimise: bool,
) -> SteeringRun:
    temperature, seed = workflow.molecule.temperature, workflow.seed + number
    return SteeringRun(number, molecule.system_xml, molecule.positions, torsions, angles, temperature, seed, minimise)


def _automatic(workflow: Workflow, molecule: MolecularSystem, executor: Executor) -> list[Start]:
    """Draw rotatable torsions at random, minimise, and keep distinct low minima."""
    settings = workflow.simulate
    particles = particles_from_topology(molecule.topology, molecule.system)
    zmatrix = build_zmatrix(particles)
    placed = [row for row in zmatrix.rows if row.torsion >= 0]
    bridges = cast(Iterable[tuple[int, int]], networkx.bridges(networkx.Graph(particles.bonds)))
    turning = {frozenset(bond) for bond in bridges}  # bonds that are in no ring
    columns = [
        index
        for index, row in enumerate(placed)
        if not row.relative and not row.rotor and frozenset((row.bond, row.angle)) in turning
    ]
    rotatable = tuple((row.atom, row.bond, row.angle, row.torsion) for row in (placed[index] for index in columns))
    if not rotatable:
        return [Start("start", molecule.positions, settings.automatic_trajectories, settings.frames)]
    generator = np.random.default_rng(workflow.seed)
    runs = []
    for number in range(_TRIES * settings.automatic_basins):
        angles = tuple(float(angle) for angle in generator.uniform(-math.pi, math.pi, len(rotatable)))
        runs.append(_steering(workflow, molecule, number, rotatable, angles, minimise=True))
    made = dict(track(executor(run_steering, runs), "searching basins", len(runs)))
    structures = np.stack([made[number] for number in sorted(made)])
    energies, _ = OpenMMEnergy(molecule.system, workers=1).energies_and_forces(structures)
    point, _ = InternalCoordinates(zmatrix).inverse(torch.as_tensor(structures))
    torsions = point.torsions.numpy()[:, columns]
    handedness = _handedness(particles, np.concatenate([molecule.positions[None], structures]))
    same_isomer = (handedness[1:] == handedness[0]).all(1)
    kept: list[int] = []
    limit = np.nanmin(energies) + _HIGHEST * thermal_energy(workflow.molecule.temperature)
    for index in np.argsort(energies):
        distance = np.abs(np.angle(np.exp(1j * (torsions[kept] - torsions[index]))))
        if same_isomer[index] and energies[index] <= limit and (not kept or distance.max(1).min() > _SAME):
            kept.append(int(index))
    if not kept:
        raise ConfigurationError("no starting structure could be minimised: name basins in [[simulate.basins]]")
    return [
        Start(f"basin {number + 1}", structures[index], settings.automatic_trajectories, settings.frames)
        for number, index in enumerate(kept[: settings.automatic_basins])
    ]


def _handedness(particles: Particles, positions: FloatArray) -> FloatArray:
    """Return the sign of the triple product at every atom with four neighbours, ``(F, C)``."""
    graph = networkx.Graph(particles.bonds)
    centres = [(atom, sorted(graph.neighbors(atom))) for atom in graph if graph.degree[atom] == 4]
    signs = np.empty((len(positions), len(centres)))
    for column, (atom, neighbours) in enumerate(centres):
        a, b, c = (positions[:, other] - positions[:, atom] for other in neighbours[:3])
        signs[:, column] = np.sign((np.cross(a, b) * c).sum(-1))
    return signs
