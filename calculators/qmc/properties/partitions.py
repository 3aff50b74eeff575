"""Partitions of a density into atoms: by free atoms (Hirshfeld) and by fuzzy cells (Becke)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from ..electronic_structure import require_pyscf
from ..molecule import Molecule

_RADII = np.concatenate([[0.0], np.geomspace(1e-3, 25.0, 400)])  # bohr


@lru_cache(maxsize=16)
def _free_atom(number: int) -> CubicSpline:
    """Return the logarithm of the spherical density of a neutral atom as a function of the radius."""
    pyscf = require_pyscf()
    from pyscf.data import elements
    from pyscf.scf import atom_hf

    symbol = elements.ELEMENTS[number]
    mole = pyscf.gto.M(atom=[(symbol, (0.0, 0.0, 0.0))], basis="aug-cc-pvtz", unit="Bohr", spin=number % 2, verbose=0)
    _, _, coefficients, occupations = atom_hf.get_atm_nrhf(mole)[symbol]
    # The density is spherical: the occupations are averaged over the components of open shells.
    points = np.zeros((len(_RADII), 3))
    points[:, 2] = _RADII
    values = mole.eval_gto("GTOval_sph", points) @ coefficients
    density = (values**2 * occupations).sum(1)
    # The floor replaces the tail, where Gaussians decay too fast.
    return CubicSpline(_RADII, np.log(np.maximum(density, 1e-60)))


def promolecule_density(molecule: Molecule, points: Tensor) -> Tensor:
    """Return the densities of the free atoms ``(A, P)`` at ``points`` ``(P, 3)`` in bohr, in e/bohr^3."""
    distances = torch.cdist(molecule.centers, points).numpy()
    rows = [
        np.exp(_free_atom(number)(np.minimum(row, _RADII[-1])))
        for number, row in zip(molecule.numbers, distances, strict=True)
    ]
    return torch.as_tensor(np.stack(rows))


def hirshfeld_weights(molecule: Molecule, points: Tensor) -> Tensor:
    """Return the weight ``(A, P)`` of each atom at ``points``: its free density over the sum of all."""
    densities = promolecule_density(molecule, points)
    total = densities.sum(0)
    even = torch.full_like(densities, 1.0 / len(molecule.numbers))
    return torch.where(total > 1e-50, densities / total.clamp_min(1e-50), even)


def becke_weights(molecule: Molecule, points: Tensor) -> Tensor:
    """Return Becke's cell functions ``(A, P)``, with sizes of atoms after Bragg and Slater."""
    require_pyscf()
    from pyscf.data import radii

    centers = molecule.centers
    sizes = torch.tensor([float(radii.BRAGG[number]) for number in molecule.numbers], dtype=torch.float64)
    distances = torch.cdist(centers, points)
    cells = torch.ones_like(distances)
    for i in range(len(centers)):
        for j in range(len(centers)):
            if i == j:
                continue
            mu = (distances[i] - distances[j]) / torch.linalg.vector_norm(centers[i] - centers[j])
            ratio = sizes[i] / sizes[j]
            u = (ratio - 1.0) / (ratio + 1.0)
            a = float((u / (u * u - 1.0)).clamp(-0.5, 0.5)) if float(u) != 0.0 else 0.0
            nu = mu + a * (1.0 - mu * mu)
            for _ in range(3):
                nu = 1.5 * nu - 0.5 * nu**3
            cells[i] *= 0.5 * (1.0 - nu)
    return cells / cells.sum(0)
