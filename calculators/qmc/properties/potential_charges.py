"""Point charges for force fields that reproduce the electrostatic potential of a density around a molecule.

Restrained fits after C. I. Bayly, P. Cieplak, W. D. Cornell and P. A. Kollman, J. Phys. Chem. 97, 10269 (1993): charges on
the nuclei are fitted to the potential on shells about the van der Waals surface (U. C. Singh and P. A. Kollman, J. Comput.
Chem. 5, 129, 1984), with a hyperbolic restraint on atoms other than hydrogen, under the total charge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data.vdw_alvarez import vdw_radii
from ase.units import Bohr
from numpy.typing import NDArray

from ....core.errors import ConfigurationError, ConvergenceError
from ....core.statistics.bootstrap import Estimate
from ..molecule import Molecule
from .properties import DensityProperties, jackknife, sphere_points

Array = NDArray[np.float64]

SHELLS = (1.4, 1.6, 1.8, 2.0)
"""Radii of the shells, in van der Waals radii."""

_RESTRAINT, _TIGHTNESS = 5e-4, 0.1  # atomic units; those of the paper's first stage
_BONDI = {1: 1.20, 2: 1.40, 6: 1.70, 7: 1.55, 8: 1.52, 9: 1.47, 10: 1.54}  # Angstrom
_ITERATIONS = 200


@dataclass(frozen=True)
class PotentialCharges:
    """Charges fitted to the electrostatic potential.

    Attributes:
        charges: charges ``(A,)`` in e, with errors.
        relative_error: root mean square of the residual potential over that of the potential.
        dipole: dipole ``(3,)`` of the charges in e bohr, about the centre of the nuclear charges.
        points: number of fitted points.
    """

    charges: Estimate[Array]
    relative_error: float
    dipole: Array
    points: int


def shell_points(molecule: Molecule, density: float = 1.0) -> Array:
    """Return points ``(Q, 3)`` in bohr on four shells about the molecule.

    Args:
        molecule: nuclei.
        density: number of points per square Angstrom.
    """
    if not density > 0.0:
        raise ConfigurationError(f"the density of points must be positive, got {density}")
    centers = molecule.centers.numpy()
    radii = np.array([_BONDI.get(number, float(vdw_radii[number])) for number in molecule.numbers]) / Bohr
    found = []
    for factor in SHELLS:
        for center, radius in zip(centers, factor * radii, strict=True):
            count = max(12, int(4.0 * np.pi * (radius * Bohr) ** 2 * density))
            points = center + radius * sphere_points(count).numpy()
            distances = np.linalg.norm(points[:, None] - centers, axis=2)
            found.append(points[(distances >= factor * radii - 1e-9).all(1)])
    return np.concatenate(found)


def potential_charges(
    properties: DensityProperties,
    *,
    equivalent: Sequence[Sequence[int]] = (),
    restraint: float = _RESTRAINT,
    density: float = 1.0,
) -> PotentialCharges:
    """Fit charges to the electrostatic potential of a density.

    Args:
        properties: properties of the density.
        equivalent: groups of atoms that must have the same charge, such as the hydrogens of a methyl group.
        restraint: strength of the restraint in atomic units; 0 for none.
        density: density of points, see :func:`shell_points`.

    Raises:
        ConfigurationError: for groups of atoms that do not exist or overlap.
        ConvergenceError: when the restrained fit does not converge.
    """
    molecule = properties.molecule
    groups = _groups(len(molecule.numbers), equivalent)
    points = shell_points(molecule, density)
    potentials = properties.potential_replicas(points).numpy()  # (1 + R, Q)
    distances = np.linalg.norm(points[:, None] - molecule.centers.numpy(), axis=2)
    design = (1.0 / distances) @ groups
    heavy = np.array([number > 1 for number in molecule.numbers]) @ groups > 0
    sizes = groups.sum(0)
    fits = np.array([_fit(design, row, sizes, heavy, float(molecule.charge), restraint) for row in potentials])
    charges = fits @ groups.T
    missed = potentials[0] - design @ fits[0]
    charges_of_nuclei = molecule.charges.numpy()
    origin = charges_of_nuclei @ molecule.centers.numpy() / charges_of_nuclei.sum()
    return PotentialCharges(
        jackknife(torch.as_tensor(charges)),
        float(np.sqrt((missed**2).mean() / (potentials[0] ** 2).mean())),
        charges[0] @ (molecule.centers.numpy() - origin),
        len(points),
    )


def _groups(atoms: int, equivalent: Sequence[Sequence[int]]) -> Array:
    """Return a matrix ``(A, G)`` that gives the atoms of a group the group's charge."""
    owner = list(range(atoms))
    seen: set[int] = set()
    for group in equivalent:
        if not group or not set(group) <= set(range(atoms)) or seen & set(group):
            raise ConfigurationError(
                f"equivalent atoms must be separate groups of indices from 0 to {atoms - 1}, got {list(equivalent)}"
            )
        seen |= set(group)
        for index in group:
            owner[index] = group[0]
    columns = sorted(set(owner))
    matrix = np.zeros((atoms, len(columns)))
    matrix[np.arange(atoms), [columns.index(one) for one in owner]] = 1.0
    return matrix


def _fit(
    design: Array, potential: Array, sizes: Array, heavy: NDArray[np.bool_], total: float, restraint: float
) -> Array:
    """Return charges ``(G,)``: least squares under the total charge, the restraint by iteration."""
    count = len(sizes)
    matrix = np.zeros((count + 1, count + 1))
    matrix[count, :count] = matrix[:count, count] = sizes
    right = np.append(design.T @ potential, total)
    normal = design.T @ design
    charges = np.zeros(count)
    for _ in range(_ITERATIONS):
        # The paper's a has the weight of the whole sum of squares, not of its mean.
        stiffness = np.where(heavy, restraint * sizes / np.sqrt(charges**2 + _TIGHTNESS**2), 0.0)
        matrix[:count, :count] = normal + np.diag(stiffness)
        found = np.linalg.lstsq(matrix, right, rcond=None)[0][:count]
        if np.abs(found - charges).max() < 1e-8:
            return found
        charges = found
    raise ConvergenceError("the restrained fit of charges did not converge: lower the restraint")
