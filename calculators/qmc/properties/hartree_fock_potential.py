"""The electrostatic potential of PySCF's Hartree-Fock density in closed form, as the reference that densities differ from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..density.densities import GaussianDensity
from ..electronic_structure import mean_field
from ..molecule import Molecule


@dataclass(frozen=True)
class GaussianPotential:
    """A density matrix with the potential of its electrons.

    Attributes:
        model: its density.
        mole: the ``pyscf.gto.Mole``.
        matrix: ``(K, K)``.
    """

    model: GaussianDensity
    mole: Any
    matrix: Tensor

    def density(self, points: Tensor) -> Tensor:
        """Return the density ``(P,)`` at ``points`` ``(P, 3)`` in bohr."""
        return self.model.rho(points)

    def potential(self, points: Tensor) -> Tensor:
        """Return ``int rho/|r - r'|`` at ``points`` ``(P, 3)`` in bohr, in Hartree/e."""
        parts = [
            torch.einsum("pij,ij->p", torch.as_tensor(self.mole.intor("int1e_grids", grids=part.numpy())), self.matrix)
            for part in points.split(256)
        ]
        return torch.cat(parts)


@lru_cache(maxsize=4)
def hartree_fock_potential(molecule: Molecule) -> GaussianPotential:
    """Return Hartree-Fock's density and potential of a molecule."""
    method = mean_field(molecule, "cc-pvtz", tight=True)  # what is missing is summed on the grid
    matrix = method.make_rdm1()
    total = torch.as_tensor(matrix if matrix.ndim == 2 else matrix.sum(0), dtype=torch.float64)
    return GaussianPotential(GaussianDensity(molecule, method.mol, total), method.mol, total)
