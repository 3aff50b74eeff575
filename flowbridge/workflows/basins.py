"""Starting structures of the training trajectories: named in the TOML, or found automatically."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import ConfigurationError
from ..core.units import thermal_energy
from ..flows.internal_coordinates import InternalCoordinates
from ..flows.zmatrix import build_zmatrix
from ..integrations.openmm.dynamics import map_processes
from ..integrations.openmm.energies import OpenMMEnergy
from ..integrations.openmm.particles import particles_from_topology
from ..integrations.openmm.steering import Torsion, steer
from ..integrations.openmm.systems import MolecularSystem
from .configuration import Workflow
from .progress import track

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


@dataclass(frozen=True)
class _Steering:
    system_xml: str
    positions: FloatArray
    torsions: tuple[Torsion, ...]
    targets: tuple[float, ...]
    temperature: float
    seed: int
    minimise: bool
    order: int


def _steered(job: _Steering) -> tuple[int, FloatArray]:
    structure = steer(
        job.system_xml, job.positions, job.torsions, job.targets, job.temperature, job.seed, job.minimise
    )
    return job.order, structure


def starting_structures(workflow: Workflow, molecule: MolecularSystem) -> list[Start]:
    """Return one start a basin."""
    if workflow.simulate.basins:
        return _named(workflow, molecule)
    return _automatic(workflow, molecule)


def _named(workflow: Workflow, molecule: MolecularSystem) -> list[Start]:
    jobs = []
    for order, basin in enumerate(workflow.simulate.basins):
        names = tuple(basin.torsions)
        jobs.append(
            _Steering(
                molecule.system_xml,
                molecule.positions,
                tuple(molecule.torsion_atoms(workflow.molecule.torsions[name]) for name in names),
                tuple(math.radians(basin.torsions[name]) for name in names),
                workflow.molecule.temperature,
                workflow.seed,
                False,
                order,
            )
        )
    made = dict(track(map_processes(_steered, jobs, workflow.workers), "starting structures", len(jobs)))
    return [
        Start(basin.name, made[order], basin.trajectories, basin.frames or workflow.simulate.frames)
        for order, basin in enumerate(workflow.simulate.basins)
    ]


def _automatic(workflow: Workflow, molecule: MolecularSystem) -> list[Start]:
    """Draw rotatable torsions at random, minimise, and keep distinct low minima."""
    settings = workflow.simulate
    particles = particles_from_topology(molecule.topology, molecule.system)
    zmatrix = build_zmatrix(particles)
    rotatable = tuple(
        (row.atom, row.bond, row.angle, row.torsion)
        for row in zmatrix.rows
        if row.torsion >= 0 and not row.relative and not row.rotor
    )
    if not rotatable:
        return [Start("start", molecule.positions, settings.automatic_trajectories, settings.frames)]
    generator = np.random.default_rng(workflow.seed)
    jobs = [
        _Steering(
            molecule.system_xml, molecule.positions, rotatable,
            tuple(float(x) for x in generator.uniform(-math.pi, math.pi, len(rotatable))),
            workflow.molecule.temperature, workflow.seed + order, True, order,
        )
        for order in range(_TRIES * settings.automatic_basins)
    ]  # fmt: skip
    made = dict(track(map_processes(_steered, jobs, workflow.workers), "searching basins", len(jobs)))
    structures = np.stack([made[order] for order in sorted(made)])
    energies, _ = OpenMMEnergy(molecule.system, workers=1).energies_and_forces(structures)
    point, _ = InternalCoordinates(zmatrix).inverse(torch.as_tensor(structures))
    columns = [i for i, row in enumerate(r for r in zmatrix.rows if r.torsion >= 0) if not row.relative and not row.rotor]
    torsions = point.torsions.numpy()[:, columns]
    kept: list[int] = []
    limit = np.nanmin(energies) + _HIGHEST * thermal_energy(workflow.molecule.temperature)
    for index in np.argsort(energies):
        distance = np.abs(np.angle(np.exp(1j * (torsions[kept] - torsions[index]))))
        if energies[index] <= limit and (not kept or distance.max(1).min() > _SAME):
            kept.append(int(index))
    if not kept:
        raise ConfigurationError("no starting structure could be minimised: name basins in [[simulate.basins]]")
    return [
        Start(f"basin {number + 1}", structures[index], settings.automatic_trajectories, settings.frames)
        for number, index in enumerate(kept[: settings.automatic_basins])
    ]
