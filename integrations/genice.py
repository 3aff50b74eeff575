"""GenIce2: crystals of ice, as positions and orientations of their molecules.

M. Matsumoto, T. Yagasaki, H. Tanaka, J. Chem. Inf. Model. 61, 2542 (2021).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigurationError, MissingDependencyError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class IceStructure:
    """Water molecules on the sites of a crystal.

    Attributes:
        positions: ``(M, 3)`` nm, oxygens to within the size of a molecule.
        rotations: ``(M, 3, 3)``, from the frame of a molecule to the laboratory: z along the bisector of the hydrogens, away
            from the oxygen, y from one hydrogen to the other.
        cell: ``(3, 3)`` nm, row vectors.
        density: g/cm^3.
    """

    positions: FloatArray
    rotations: FloatArray
    cell: FloatArray
    density: float


def ice_structure(lattice: str, repeats: tuple[int, int, int] = (1, 1, 1), seed: int = 0) -> IceStructure:
    """Return a crystal in GenIce's own documented cell, its hydrogen bonds ordered as the lattice says or at random.

    Args:
        lattice: GenIce's name, ``"XI"`` for the hydrogen-ordered ice XI of A. D. Jackson et al., ``"1h"`` for ice Ih.
        repeats: copies of its cell along each axis.
        seed: of the directions of hydrogen bonds that the lattice leaves open.

    Raises:
        MissingDependencyError: when GenIce2 is not installed.
        ConfigurationError: for a lattice it does not know, or repeats below one.
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
    # GenIce turns row vectors by its matrices.
    rotations = np.array(made["rotmatrices"], dtype=np.float64).transpose(0, 2, 1)
    positions = np.array(made["reppositions"], dtype=np.float64) @ cell
    mass = 18.01528 / 6.02214076e23
    return IceStructure(positions, rotations, cell, len(positions) * mass / (abs(np.linalg.det(cell)) * 1e-21))


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Let GenIce draw from its own random numbers, which are NumPy's global ones, and log nothing about its parts' versions."""
    state = np.random.get_state()  # noqa: NPY002
    disabled = logging.root.manager.disable
    np.random.seed(seed)  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        np.random.set_state(state)  # noqa: NPY002
