"""Densities on the grid of a cell, and as Gaussian cube files that ASE, VESTA and PySCF read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import InputError
from ase.io.cube import write_cube
from ase.units import Bohr
from numpy.typing import NDArray

from ....core.errors import ConfigurationError
from .densities import DensityModel

Array = NDArray[np.float64]
LARGEST_GRID = 40_000_000
"""Largest number of points of a grid."""


def cell_grid(atoms: Atoms, spacing: float) -> tuple[Array, tuple[int, int, int]]:
    """Return points ``(P, 3)`` in bohr, at fractions i/n of the cell, and their number along each vector.

    Args:
        atoms: Atoms with a cell of three vectors.
        spacing: largest distance of neighbouring points, Angstrom.

    Raises:
        InputError: without such a cell.
        ConfigurationError: for a spacing that is not positive, or makes too many points.
    """
    if atoms.cell.rank < 3:
        raise InputError("a density on a grid needs a cell: call atoms.center(vacuum=4.0) first, for instance")
    if not spacing > 0.0:
        raise ConfigurationError(f"the spacing of a grid must be positive, got {spacing!r} Angstrom")
    counts = np.maximum(1, np.ceil(atoms.cell.lengths() / spacing - 1e-9)).astype(int)
    if counts.prod() > LARGEST_GRID:
        raise ConfigurationError(f"a spacing of {spacing} Angstrom makes {counts.prod()} points: choose a wider one")
    fractions = np.stack(np.meshgrid(*(np.arange(n) / n for n in counts), indexing="ij"), axis=-1)
    points = fractions.reshape(-1, 3) @ atoms.cell.array / Bohr
    return points, (int(counts[0]), int(counts[1]), int(counts[2]))


def density_on_cell(density: DensityModel, atoms: Atoms, spacing: float = 0.2) -> Array:
    """Return the density on the grid of the cell ``(n1, n2, n3)`` in e/bohr^3.

    Raises as :func:`cell_grid`.
    """
    points, counts = cell_grid(atoms, spacing)
    values: Array = density.rho(torch.as_tensor(points)).numpy().reshape(counts)
    return values


def write_density_cube(path: str | os.PathLike[str], density: DensityModel, atoms: Atoms, spacing: float) -> None:
    """Write the density as a cube file, in e/bohr^3 as is the custom, whole or not at all.

    Raises as :func:`cell_grid`.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:  # ASE writes through the file descriptor
        values = density_on_cell(density, atoms, spacing)
        write_cube(file, atoms, values, comment="electron density, e/bohr^3, by flowbridge")
    part.replace(path)
