"""Properties of a molecule from its electron density, each with a jackknife error bar.

The same code integrates every density (fitted, in closed form, or a density matrix of PySCF) on the same grid, so that
comparisons are fair. Everything is in atomic units; multiply dipoles by ``ase.units.Bohr`` for e Angstrom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....core.errors import ConfigurationError
from ....core.statistics.bootstrap import Estimate
from ..density.densities import DensityModel, hartree_fock_density
from ..electronic_structure import CHUNK, Quadrature, becke_quadrature
from .partitions import becke_weights, hirshfeld_weights

Array = NDArray[np.float64]


def jackknife(values: Tensor) -> Estimate[Array]:
    """Return the first of ``(1 + R, ...)`` values, with the jackknife error from the R replicas that follow.

    ``error^2 = (R - 1)/R sum_g (theta_g - mean)^2``; zero without replicas.
    """
    value = values[0].numpy().copy()
    replicas = values[1:]
    if len(replicas) == 0:
        return Estimate(value, np.zeros_like(value))
    variance = (replicas - replicas.mean(0)).square().sum(0) * (len(replicas) - 1) / len(replicas)
    return Estimate(value, variance.sqrt().numpy())


class DensityProperties:
    """Integrals of a density.

    Args:
        density: model of the density.
        grid: quadrature; PySCF's grid of the molecule at level 4 where None.
    """

    def __init__(self, density: DensityModel, grid: Quadrature | None = None) -> None:
        self.density = density
        self.molecule = density.molecule
        self.grid = becke_quadrature(self.molecule) if grid is None else grid

    @cached_property
    def _weighted(self) -> Tensor:
        """Density times quadrature weight, ``(1 + R, P)``."""
        return self.density.with_replicas(self.grid.points) * self.grid.weights

    def integral(self, values: Tensor) -> Estimate[Array]:
        """Return the integral of the density times ``values`` ``(P,)`` or ``(P, ...)`` on the grid."""
        flat = values.reshape(len(values), -1)
        return jackknife((self._weighted @ flat).reshape(-1, *values.shape[1:]))

    def electrons(self) -> Estimate[Array]:
        """Return the number of electrons on the grid."""
        return self.integral(torch.ones_like(self.grid.weights))

    def dipole(self) -> Estimate[Array]:
        """Return the dipole moment ``(3,)`` in e bohr, nuclei included, from negative to positive charge.

        The dipole of a charged molecule depends on the origin, which is the centre of the nuclear charges.
        """
        places = self._places()
        nuclear = self.molecule.charges @ (self.molecule.centers - self._origin())
        return jackknife(nuclear - self._weighted @ places)

    def quadrupole(self) -> Estimate[Array]:
        """Return the traceless quadrupole ``(3, 3)`` in e bohr^2, ``sum q (3 r r - r^2)/2`` (Buckingham).

        The origin is the centre of the nuclear charges.
        """
        nuclear = torch.einsum("a,axy->xy", self.molecule.charges, _traceless(self.molecule.centers - self._origin()))
        places = _traceless(self._places()).reshape(-1, 9)
        return jackknife(nuclear - (self._weighted @ places).reshape(-1, 3, 3))

    def second_moment(self, atom: int | None = None) -> Estimate[Array]:
        """Return ``<r^2>`` of the electrons in bohr^2, about an atom or the centre of the nuclear charges."""
        origin = self._origin() if atom is None else self.molecule.centers[self._index(atom)]
        return self.integral((self.grid.points - origin).square().sum(1))

    def contact_densities(self) -> Estimate[Array]:
        """Return the density at the nuclei ``(A,)`` in e/bohr^3."""
        return jackknife(self.density.with_replicas(self.molecule.centers))

    def forces(self) -> Estimate[Array]:
        """Return the Hellmann-Feynman forces on the nuclei ``(A, 3)`` in Hartree/bohr.

        ``F_A = Z_A (int rho (r - R_A)/|r - R_A|^3 + sum_B Z_B (R_A - R_B)/R_AB^3)``. They equal the derivative of the
        energy only for an exact wave function, since they lack the Pulay term; :meth:`net_force` measures their error.
        """
        return jackknife(self._forces)

    def net_force(self) -> Estimate[Array]:
        """Return the sum of the forces ``(3,)``: zero for the exact density, hence a measure of the forces' errors."""
        return jackknife(self._forces.sum(1))

    @cached_property
    def _forces(self) -> Tensor:
        """Hellmann-Feynman forces ``(1 + R, A, 3)`` of the density and its replicas."""
        charges, centers = self.molecule.charges, self.molecule.centers
        parts = []
        for charge, center in zip(charges, centers, strict=True):
            away = self.grid.points - center
            field = away / torch.linalg.vector_norm(away, dim=1, keepdim=True).clamp_min(1e-12) ** 3
            apart = center - centers
            cubed = torch.linalg.vector_norm(apart, dim=1, keepdim=True) ** 3
            nuclear = (charges[:, None] * apart / cubed.clamp_min(1e-300)).sum(0)
            parts.append(charge * (self._weighted @ field + nuclear))
        return torch.stack(parts, 1)

    def nuclear_attraction(self) -> Estimate[Array]:
        """Return the energy of the electrons in the field of the nuclei, Hartree."""
        distances = torch.cdist(self.grid.points, self.molecule.centers).clamp_min(1e-12)
        return self.integral(-(self.molecule.charges / distances).sum(1))

    def electrostatic_potential(self, points: Array) -> Estimate[Array]:
        """Return the electrostatic potential at ``points`` ``(Q, 3)`` in bohr, in Hartree/e.

        PySCF's Hartree-Fock density is integrated in closed form; only the small difference from it is summed on the grid,
        since grid points close to ``points`` would spoil a plain sum.

        Raises:
            ConfigurationError: for a point on a nucleus.
        """
        return jackknife(self.potential_replicas(points))

    def potential_replicas(self, points: Array) -> Tensor:
        """Return the electrostatic potential ``(1 + R, Q)`` of the density and its jackknife replicas.

        Arguments and errors as for :meth:`electrostatic_potential`.
        """
        places = torch.as_tensor(np.asarray(points, dtype=np.float64)).reshape(-1, 3)
        distances = torch.cdist(places, self.molecule.centers)
        if float(distances.min()) < 1e-6:
            raise ConfigurationError("the electrostatic potential is infinite at a nucleus: leave such points out")
        reference = hartree_fock_density(self.molecule)
        rest = self._weighted - reference.rho(self.grid.points) * self.grid.weights
        nuclear = (self.molecule.charges / distances).sum(1)
        parts = []
        for part in places.split(max(1, 8_000_000 // len(self.grid.points))):
            kernel = 1.0 / torch.cdist(part, self.grid.points).clamp_min(1e-6)
            parts.append(rest @ kernel.T)
        return nuclear - reference.potential(places) - torch.cat(parts, 1)

    def radial_density(self, atom: int, radii: Array) -> Estimate[Array]:
        """Return the spherical average of the density about an atom at ``radii`` (bohr), in e/bohr^3."""
        center = self.molecule.centers[self._index(atom)]
        directions = sphere_points(194)
        distances = torch.as_tensor(np.asarray(radii, dtype=np.float64)).reshape(-1)
        points = center + distances[:, None, None] * directions
        values = self.density.with_replicas(points.reshape(-1, 3))
        return jackknife(values.reshape(-1, len(distances), len(directions)).mean(2))

    def hirshfeld_charges(self) -> Estimate[Array]:
        """Return Hirshfeld's atomic charges ``(A,)`` in e, by densities of free atoms (Theor. Chim. Acta 44, 129, 1977)."""
        return self._charges(lambda points: hirshfeld_weights(self.molecule, points))

    def becke_charges(self) -> Estimate[Array]:
        """Return atomic charges ``(A,)`` in e by Becke's fuzzy cells (J. Chem. Phys. 88, 2547, 1988)."""
        return self._charges(lambda points: becke_weights(self.molecule, points))

    def absolute_difference(self, other: DensityModel) -> float:
        """Return ``int |rho - rho_other|`` per electron."""
        difference = (self._weighted[0] - other.rho(self.grid.points) * self.grid.weights).abs()
        return float(difference.sum()) / self.density.electrons

    def _charges(self, weights: Callable[[Tensor], Tensor]) -> Estimate[Array]:
        parts = torch.cat([weights(points) for points in self.grid.points.split(CHUNK)], 1)  # (A, P)
        return jackknife(self.molecule.charges - self._weighted @ parts.T)

    def _origin(self) -> Tensor:
        charges = self.molecule.charges
        return (charges[:, None] * self.molecule.centers).sum(0) / charges.sum()

    def _places(self) -> Tensor:
        return self.grid.points - self._origin()

    def _index(self, atom: int) -> int:
        if not 0 <= atom < len(self.molecule.numbers):
            raise ConfigurationError(f"there is no atom {atom} among {len(self.molecule.numbers)}; they count from 0")
        return atom


def _traceless(places: Tensor) -> Tensor:
    """Return ``(3 r r - r^2)/2`` ``(P, 3, 3)``."""
    square = places.square().sum(1)[:, None, None] * torch.eye(3, dtype=places.dtype)
    return 0.5 * (3.0 * places[:, :, None] * places[:, None, :] - square)


def sphere_points(count: int) -> Tensor:
    """Return directions ``(count, 3)`` evenly distributed over the sphere (Fibonacci's lattice)."""
    number = torch.arange(count, dtype=torch.float64) + 0.5
    height = 1.0 - 2.0 * number / count
    angle = math.pi * (1.0 + 5.0**0.5) * number
    radius = (1.0 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1)
