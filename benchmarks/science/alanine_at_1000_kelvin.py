"""Alanine dipeptide in vacuum at 1000 K: frames, affine coupling flows on its internal coordinates, torsions compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import app
from torch import Tensor

from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.core.potential import Particles
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.molecule_coordinates import MoleculeCoordinates
from flowbridge.flows.stochastic.molecules import FlatCoordinates
from flowbridge.flows.transforms.bijection import Bijection
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.sinh_arcsinh import Affine
from flowbridge.integrations.openmm import OpenMMEnergy
from flowbridge.integrations.openmm.forces.particles import particles_from_topology
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, load_trajectory, run_all

from ..molecules import alanine_topology

TEMPERATURE = 1000.0
_BINS = 60
_HIDDEN = (128, 128, 128)


@dataclass(frozen=True)
class Alanine:
    """The molecule, and what dynamics at 1000 K says about it.

    Attributes:
        particles: its 22 atoms.
        system: Amber ff96 without solvent and constraints.
        energy: evaluator of the System, one Context.
        flat: its 60 internal coordinates, torsions that turn first.
        training: frames in flat coordinates ``(F, 60)``, float64.
        test: frames of another trajectory.
        lowest: lowest energy of the training frames, kJ/mol.
        names: names of the soft torsions, in the order of the coordinates.
    """

    particles: Particles
    system: openmm.System
    energy: OpenMMEnergy
    flat: FlatCoordinates
    training: Tensor
    test: Tensor
    lowest: float
    names: tuple[str, ...]


def simulated_alanine(folder: Path, frames: int) -> Alanine:
    """Return the molecule with two trajectories of ``frames`` frames, 50 fs apart; those in ``folder`` are used again."""
    topology, positions = alanine_topology()
    system = app.ForceField("amber96.xml").createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None)
    xml = openmm.XmlSerializer.serialize(system)
    runs = [
        LangevinRun(xml, positions, TEMPERATURE, 0.001, 5.0, 5000, 50, frames, seed, folder / f"{frames}-{seed}.npz")
        for seed in (1, 2)
    ]
    for _ in run_all(runs, ProcessExecutor(1)):
        pass
    training, test = (load_trajectory(run.file) for run in runs)
    particles = particles_from_topology(topology, system)
    coordinates = MoleculeCoordinates.fit(particles, training.positions, FlowConfiguration())
    flat = FlatCoordinates.fit(coordinates, torch.as_tensor(training.positions))
    values = [flat.inverse(torch.as_tensor(run.positions))[0] for run in (training, test)]
    energy = OpenMMEnergy(system, platform="Reference", workers=1)
    return Alanine(
        particles, system, energy, flat, *values, float(training.energies.min()), _names(particles, coordinates)
    )


def _names(particles: Particles, coordinates: MoleculeCoordinates) -> tuple[str, ...]:
    """Return phi, psi, or the methyl group that a torsion turns."""
    rows = [row for row in coordinates.internal.zmatrix.rows if row.torsion >= 0]
    known = {("N", "CA"): "phi", ("CA", "C"): "psi"}
    names = []
    for index in coordinates.layout.circular:
        row = rows[index]
        ends = (particles.names[row.bond], particles.names[row.angle])
        residue = particles.residue_names[row.bond]
        name = known.get(ends) or known.get(ends[::-1]) if residue == "ALA" and not row.rotor else None
        names.append(name or f"methyl of {residue}" if row.rotor or name else "-".join(ends))
    return tuple(names)


def coupling_blocks(
    dimension: int, blocks: int, generator: torch.Generator, mixing: Callable[[int], Bijection] | None = None
) -> list[list[Bijection]]:
    """Return blocks of two affine couplings each, between halves of the coordinates, in the order latent -> data.

    Args:
        dimension: number of coordinates.
        blocks: number of blocks.
        generator: source of random numbers for the initial weights, and of the halves.
        mixing: makes the layer after each block, from its number; the halves are then the same in all blocks.
            Where None, each block draws its own.
    """
    made = []
    for number in range(blocks):
        if mixing is None or number == 0:
            order = torch.randperm(dimension, generator=generator).tolist()
        halves = (sorted(order[: dimension // 2]), sorted(order[dimension // 2 :]))
        block: list[Bijection] = [Coupling(dimension, half, Affine(), _HIDDEN, generator) for half in halves]
        made.append(block if mixing is None else [*block, mixing(number)])
    return made


def torsion_divergences(alanine: Alanine, value: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Return ``KL(dynamics | model)`` of each torsion, from histograms of 60 bins; every bin has one count more.

    Args:
        alanine: molecule with the frames of the test trajectory.
        value: samples ``(S, 60)`` in flat coordinates.
        weights: ``(S,)`` that sum to one, or None.
    """
    divergences = {}
    for index, name in enumerate(alanine.names):
        reference = _histogram(alanine.test[:, index], None)
        model = _histogram(value[:, index], weights)
        divergences[name] = float(np.sum(reference * np.log(reference / model)))
    return divergences


def _histogram(column: Tensor, weights: Tensor | None) -> NDArray[np.float64]:
    turns = (column.double().numpy() / np.sqrt(12.0) + 0.5) % 1.0
    shares = None if weights is None else weights.double().numpy() * len(turns)
    counts = np.histogram(turns, _BINS, (0.0, 1.0), weights=shares)[0] + 1.0
    return np.asarray(counts / counts.sum())
