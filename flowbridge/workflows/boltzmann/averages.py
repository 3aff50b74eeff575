"""Reweighted averages that every molecule has, next to those of the data that the flow was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...core.samples import WeightedSamples
from ...core.units import thermal_energy
from ...flows.boltzmann.generator import BoltzmannGenerator
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.sampling.dynamics import Trajectory
from ...integrations.openmm.sampling.torsion_bias import torsion_angles
from ...integrations.openmm.systems.input_files import MolecularSystem

_WELLS = {"gauche+": 60.0, "trans": 180.0, "gauche-": -60.0}  # degrees, IUPAC 1974: thirds of the circle around these


class Average(NamedTuple):
    """A reweighted average with its standard error, and the plain average over the training data."""

    name: str
    value: float
    error: float
    training: float


def averages(
    samples: Sequence[WeightedSamples], frames: Trajectory, torsions: dict[str, tuple[int, int, int, int]]
) -> list[Average]:
    """Return the mean potential energy (kJ/mol) and the population of each rotamer of each torsion.

    Args:
        samples: sets of one generator, with a reduced potential ``"target"``.
        frames: the training data.
        torsions: name to the indices of four atoms.
    """
    pooled = WeightedSamples.concatenate(list(samples)) if len(samples) > 1 else samples[0]
    kT = thermal_energy(pooled.temperature)
    # A sample without a finite energy has no weight, and its energy is nobody's.
    reduced = np.where(np.isneginf(pooled.log_weights), 0.0, pooled.reduced_potentials["target"])
    energy = pooled.average(kT * reduced)
    found = [
        Average("potential energy (kJ/mol)", float(energy.value), float(energy.error), float(frames.energies.mean()))
    ]
    for name, atoms in torsions.items():
        drawn, trained = (np.degrees(torsion_angles(x, atoms)) for x in (pooled.positions, frames.positions))
        for well, centre in _WELLS.items():
            population = pooled.average(_within(drawn, centre))
            found.append(
                Average(
                    f"{name} {well}",
                    float(population.value),
                    float(population.error),
                    float(_within(trained, centre).mean()),
                )
            )
    return found


def rotatable_torsions(model: BoltzmannGenerator, molecule: MolecularSystem) -> dict[str, tuple[int, int, int, int]]:
    """Return the torsions that the flow found to be soft and that turn more than hydrogens, named by their atoms."""
    layout = model.coordinates.layout
    rows = [row for row in build_zmatrix(model.metadata.particles).rows if row.torsion >= 0]
    atoms = list(molecule.topology.atoms())
    found = {}
    for index in layout.circular[: len(layout.circular) - layout.rotors]:
        row = rows[index]
        four = (row.atom, row.bond, row.angle, row.torsion)
        found["-".join(f"{atoms[i].residue.name}:{atoms[i].name}" for i in four)] = four
    return found


def _within(angles: np.ndarray[Any, Any], centre: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.abs((angles - centre + 180.0) % 360.0 - 180.0) < 60.0).astype(np.float64)
