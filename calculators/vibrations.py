"""The lowest vibration of a relaxed molecule, which shows whether it is at a minimum."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.units import J as joule
from ase.units import _hbar, invcm, kg, m
from numpy.typing import NDArray

_STEP = 0.005  # Å


def lowest_frequency(atoms: Atoms) -> float:
    """Return the lowest frequency of a molecule in 1/cm, negative where it is imaginary.

    The Hessian comes from 6N central differences of forces; translations and rotations are projected out.

    Args:
        atoms: relaxed molecule of two or more atoms, with a calculator.
    """
    hessian = _hessian(atoms)
    masses = np.repeat(atoms.get_masses(), 3)
    scaled = hessian / np.sqrt(masses[:, None] * masses[None])
    inside = _vibrations(atoms)
    values = np.linalg.eigvalsh(inside.T @ scaled @ inside)
    # eV / (Å^2 amu) to the square of an energy in eV
    energy = _hbar * m * np.sqrt(joule * kg) * np.sqrt(abs(values[0])) * np.sign(values[0])
    return float(energy / invcm)


def _hessian(atoms: Atoms) -> NDArray[np.float64]:
    moved = atoms.copy()
    moved.calc = atoms.calc
    count = 3 * len(atoms)
    hessian = np.zeros((count, count))
    for row in range(count):
        forces = []
        for sign in (1.0, -1.0):
            positions = atoms.get_positions()
            positions.flat[row] += sign * _STEP
            moved.positions = positions
            forces.append(moved.get_forces().reshape(-1))
        hessian[row] = (forces[1] - forces[0]) / (2.0 * _STEP)
    return 0.5 * (hessian + hessian.T)


def _vibrations(atoms: Atoms) -> NDArray[np.float64]:
    """Return an orthonormal basis ``(3N, M)`` of mass-weighted displacements without translation and rotation."""
    weights = np.sqrt(atoms.get_masses())[:, None]
    centred = atoms.positions - atoms.get_center_of_mass()
    moves = [(weights * axis).reshape(-1) for axis in np.eye(3)]
    turns = [(weights * np.cross(axis, centred)).reshape(-1) for axis in np.eye(3)]
    left, values, _ = np.linalg.svd(np.array(moves + turns).T)
    return left[:, int((values > 1e-6 * values[0]).sum()) :]
