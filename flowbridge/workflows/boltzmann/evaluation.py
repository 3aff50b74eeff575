"""Numbers that say how good a trained flow is, shared by the stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...core.potential import Potential
from ...core.units import thermal_energy
from ...integrations.openmm.sampling.dynamics import Trajectory
from ...integrations.openmm.sampling.torsion_bias import torsion_angles
from ...integrations.openmm.systems.input_files import MolecularSystem
from .configuration import FreeEnergyDifference, Workflow

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_CHUNK = 2048


def potential_forces(potential: Potential, positions: FloatArray) -> FloatArray:
    """Return forces ``(F, N, 3)`` in kJ/mol/nm at positions ``(F, N, 3)`` nm."""
    parts = torch.as_tensor(np.ascontiguousarray(positions, dtype=np.float64)).split(_CHUNK)
    return np.concatenate([potential.energy_and_forces(part).forces.double().numpy() for part in parts])


def force_errors(potential: Potential, frames: Trajectory, temperature: float) -> dict[str, float]:
    """Return the root mean square force error over all components, and of the median frame, in kT/nm."""
    difference = (potential_forces(potential, frames.positions) - frames.forces) / thermal_energy(temperature)
    squared = np.square(difference).mean((1, 2))
    return {
        "force_rmse_kT_nm": float(np.sqrt(squared.mean())),
        "force_rmse_median_frame_kT_nm": float(np.sqrt(np.median(squared))),
    }


def named_torsions(workflow: Workflow, molecule: MolecularSystem, positions: FloatArray) -> dict[str, FloatArray]:
    """Return the torsions of ``[molecule.torsions]`` in degrees, ``(...,)``, of positions ``(..., N, 3)``."""
    return {
        name: np.degrees(torsion_angles(positions, molecule.torsion_atoms(atoms)))
        for name, atoms in workflow.molecule.torsions.items()
    }


def inside(angles: FloatArray, difference: FreeEnergyDifference) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which angles (degrees) lie in the interval of a free-energy difference."""
    low, high = difference.interval
    member: np.ndarray[Any, np.dtype[np.bool_]] = (angles - low) % 360.0 < high - low
    return member


def torsion_histogram(first: FloatArray, second: FloatArray, bins: int) -> FloatArray:
    """Return counts ``(bins, bins)`` of two torsions in degrees over the full circle."""
    edges = np.linspace(-180.0, 180.0, bins + 1)
    counts: FloatArray = np.histogram2d(first.ravel(), second.ravel(), [edges, edges])[0]
    return counts
