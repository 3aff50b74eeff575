"""Molecular orbitals refitted to Slater functions: exact cusps at nuclei, exponential tails, closed-form derivatives.

Orbitals of Gaussian functions have no cusp: the local energy fluctuates near nuclei, and the density there is wrong by several
percent. Each orbital is fitted by least squares in value and gradient, under one linear condition for each
nucleus: that the spherical average of the orbital has Kato's slope ``-Z phi(R)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ....core.errors import ConvergenceError
from ..electronic_structure import MolecularOrbitals, Quadrature
from ..molecule import Molecule
from .atomic_functions import AtomicFunctions, Shell

LARGEST_MISFIT = 2e-3
"""Largest squared norm of the difference between an occupied orbital and its fit."""

_GRADIENT_WEIGHT = 0.25  # bohr^2
_RIDGE = 1e-9
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class SlaterOrbitals:
    """Orbitals as combinations of Slater functions.

    Attributes:
        functions: the Slater functions.
        up: coefficients ``(K, M)`` of spin up, occupied orbitals first.
        down: the same for spin down.
        misfit: squared norm of the largest difference between an occupied orbital and its fit.
        restricted: whether both spins share their orbitals.
    """

    functions: AtomicFunctions
    up: Tensor
    down: Tensor
    misfit: float
    restricted: bool

    def with_coefficients(self, up: Tensor, down: Tensor) -> SlaterOrbitals:
        """Return other combinations of the same functions."""
        return replace(self, up=up, down=down)


def slater_shells(molecule: Molecule) -> list[Shell]:
    """Return the Slater functions for a molecule: geometric series of exponents, from the tail to the core."""
    shells = []
    for center, number in enumerate(molecule.numbers):
        # The hydrogenic exponent is among them: with it the orbital of a bare nucleus is exact.
        exponents = [*_series(0.6, 1.6, max(1.35 * number, 2.5)), float(number)]
        shells += [Shell(center, 0, family, z) for family in ("slater", "slater_r") for z in exponents]
        shells += [Shell(center, 1, "slater", z) for z in _series(0.7, 1.75, max(2.2, 1.5 * number))]
        shells += [Shell(center, 2, "slater", z) for z in ((1.1, 2.2) if number < 5 else (1.2, 2.2, 4.0))]
    return shells


def _series(first: float, ratio: float, last: float) -> list[float]:
    values = [first]
    while values[-1] * ratio <= last:
        values.append(values[-1] * ratio)
    return values


def slater_orbitals(molecule: Molecule, orbitals: MolecularOrbitals, grid: Quadrature) -> SlaterOrbitals:
    """Fit orbitals of PySCF with Slater functions.

    Args:
        molecule: nuclei and electrons.
        orbitals: orbitals to fit.
        grid: quadrature of the fit.

    Raises:
        ConvergenceError: when an occupied orbital cannot be fitted.
    """
    functions = AtomicFunctions(molecule.centers, slater_shells(molecule))
    gram, conditions = _normal_matrix(molecule, functions, grid), _cusp_conditions(molecule, functions)
    shared = orbitals.up is orbitals.down or (
        orbitals.up.shape == orbitals.down.shape and bool(np.array_equal(orbitals.up, orbitals.down))
    )
    fits: list[Tensor] = []
    misfits: list[float] = []
    for coefficients, occupied in ((orbitals.up, molecule.spin_up), (orbitals.down, molecule.spin_down)):
        if fits and shared:
            fits.append(fits[0])
            continue
        fit, misfit = _fit(functions, gram, conditions, orbitals, coefficients, grid)
        found = orthonormal(functions, fit, grid)
        # Coefficients that symmetry forbids become exactly zero and need not be evaluated.
        fits.append(torch.where(found.abs() > _NEGLIGIBLE * found.abs().amax(0), found, torch.zeros_like(found)))
        misfits.append(float(misfit[:occupied].max()) if occupied else 0.0)
    worst = max(misfits)
    if worst > LARGEST_MISFIT:
        raise ConvergenceError(
            f"an orbital of {', '.join(molecule.labels())} is missed by {worst:.2g} (norm squared; allowed: "
            f"{LARGEST_MISFIT:g}) when it is written in Slater functions: its angular momentum is too high, or it is diffuse"
        )
    return SlaterOrbitals(functions, fits[0], fits[1], worst, shared)


def _normal_matrix(molecule: Molecule, functions: AtomicFunctions, grid: Quadrature) -> Tensor:
    """Return the inner products of the functions, with those of their gradients, ``(K, K)``."""
    gram = torch.zeros(functions.count, functions.count, dtype=torch.float64)
    for points, weights in grid.blocks():
        found = functions.evaluate(points, derivatives=1)
        gram += (found.values * weights) @ found.values.T
        for axis in range(3):
            gram += _GRADIENT_WEIGHT * (found.gradients[axis] * weights) @ found.gradients[axis].T
    return gram


def _cusp_conditions(molecule: Molecule, functions: AtomicFunctions) -> Tensor:
    """Return rows ``(A, K)`` whose product with the coefficients vanishes where the slope at each nucleus is ``-Z phi``."""
    at_nuclei = functions.evaluate(molecule.centers).values.T  # (A, K)
    rows = molecule.charges[:, None] * at_nuclei
    start = 0
    for shell in functions.shells:
        if shell.degree == 0:
            rows[shell.center, start] += -shell.parameter if shell.family == "slater" else 1.0
        start += 2 * shell.degree + 1
    return rows


def _fit(
    functions: AtomicFunctions, gram: Tensor, rows: Tensor, orbitals: MolecularOrbitals,
    coefficients: np.ndarray, grid: Quadrature,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return coefficients ``(K, M)`` and the squared norm ``(M,)`` of each orbital's difference from its fit."""
    count = coefficients.shape[1]
    right = torch.zeros(functions.count, count, dtype=torch.float64)
    norms = torch.zeros(count, dtype=torch.float64)
    cross = torch.zeros(functions.count, count, dtype=torch.float64)
    overlap = torch.zeros_like(gram)
    for points, weights in grid.blocks():
        values, *gradients = torch.as_tensor(orbitals.mole.eval_gto("GTOval_sph_deriv1", points.numpy()) @ coefficients)
        found = functions.evaluate(points, derivatives=1)
        cross += (found.values * weights) @ values
        overlap += (found.values * weights) @ found.values.T
        norms += weights @ values.square()
        for axis in range(3):
            right += _GRADIENT_WEIGHT * (found.gradients[axis] * weights) @ gradients[axis]
    right += cross
    scale = gram.diagonal().rsqrt()
    matrix = gram * scale[:, None] * scale
    matrix.diagonal().add_(_RIDGE)
    constraints = rows * scale
    constraints = constraints / torch.linalg.vector_norm(constraints, dim=1, keepdim=True)
    nuclei = len(rows)
    full = torch.zeros(len(matrix) + nuclei, len(matrix) + nuclei, dtype=torch.float64)
    full[: len(matrix), : len(matrix)] = matrix
    full[: len(matrix), len(matrix) :] = constraints.T
    full[len(matrix) :, : len(matrix)] = constraints
    right_side = torch.cat([right * scale[:, None], right.new_zeros(nuclei, count)])
    solution = torch.linalg.solve(full, right_side)[: len(matrix)] * scale[:, None]
    missed = norms - 2.0 * (solution * cross).sum(0) + (solution * (overlap @ solution)).sum(0)
    return solution, missed


def orthonormal(functions: AtomicFunctions, coefficients: Tensor, grid: Quadrature) -> Tensor:
    """Return Loewdin-orthonormalised orbitals; linear conditions on orbitals still hold for them."""
    overlap = torch.zeros(coefficients.shape[1], coefficients.shape[1], dtype=torch.float64)
    for points, weights in grid.blocks():
        values = functions.evaluate(points, coefficients).values
        overlap += (values * weights) @ values.T
    values, vectors = torch.linalg.eigh(overlap)
    return coefficients @ (vectors * values.rsqrt() @ vectors.T)
