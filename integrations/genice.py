"""GenIce2: crystals of ice as positions and orientations of molecules.

M. Matsumoto, T. Yagasaki, H. Tanaka, J. Chem. Inf. Model. 61, 2542 (2021).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import atomic_masses
from scipy.constants import Avogadro

from ..core.errors import ConfigurationError, MissingDependencyError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_WATER_MASS = 2.0 * atomic_masses[1] + atomic_masses[8]  # g/mol


@dataclass(frozen=True)
class IceStructure:
    """Water molecules at the sites of a crystal.

    Attributes:
        positions: approximate positions ``(M, 3)`` of the oxygens, nm.
        rotations: rotation matrices ``(M, 3, 3)`` from the frame of a molecule to the laboratory: z along the bisector of the
            hydrogens, away from the oxygen, y from one hydrogen to the other.
        cell: ``(3, 3)`` nm, row vectors.
        density: density, g/cm^3.
    """

    positions: FloatArray
    rotations: FloatArray
    cell: FloatArray
    density: float


def ice_structure(lattice: str, repeats: tuple[int, int, int] = (1, 1, 1), seed: int = 0) -> IceStructure:
    """Return a crystal in GenIce's cell, with the hydrogen bonds of the lattice or random ones.

    Args:
        lattice: name in GenIce, ``"XI"`` for the hydrogen-ordered ice XI of A. D. Jackson et al., ``"1h"`` for ice Ih.
        repeats: number of cells along each axis.
        seed: random seed of hydrogen bonds that the lattice does not determine.

    Raises:
        MissingDependencyError: when GenIce2 is not installed.
        ConfigurationError: for an unknown lattice, or repeats below one.
    """
    try:
        from genice2.genice import GenIce
        from genice2.plugin import Format, Lattice
    except ImportError as error:
        raise MissingDependencyError("ice is built by GenIce2: pip install 'flowbridge[flow-families]'") from error
    if len(repeats) != 3 or min(repeats) < 1:
        raise ConfigurationError(f"repeats must be three positive numbers, got {repeats}")
    with _quietly(seed):
        try:
            source = Lattice(lattice)
        except (ImportError, AssertionError, SystemExit) as error:
            raise ConfigurationError(f"GenIce2 has no lattice {lattice!r}: `genice2 --help` lists them") from error
        made = GenIce(source, reshape=np.diag(repeats)).generate_ice(Format("raw", stage=(1, 5)))
    cell = np.array(made["repcell"], dtype=np.float64)
    # GenIce multiplies row vectors by its matrices.
    rotations = np.array(made["rotmatrices"], dtype=np.float64).transpose(0, 2, 1)
    positions = np.array(made["reppositions"], dtype=np.float64) @ cell
    mass = _WATER_MASS / Avogadro
    return IceStructure(positions, rotations, cell, len(positions) * mass / (abs(np.linalg.det(cell)) * 1e-21))


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Seed NumPy's global random numbers for GenIce, silence its log, and restore both at the end."""
    state = np.random.get_state()  # noqa: NPY002
    disabled = logging.root.manager.disable
    np.random.seed(seed)  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        np.random.set_state(state)  # noqa: NPY002
