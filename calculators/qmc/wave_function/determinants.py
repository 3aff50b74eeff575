"""Slater determinants, one or a small expansion, with derivatives from the inverse matrix instead of autograd.

The matrix of one spin is ``A[i, j] = phi_j(r_i)``. Every electron fills one row, so that any operator on one electron acts
on a determinant as ``sum_j (A^-1)[j, i] (O phi_j)(r_i)``. Excited determinants are minors of ``M = A^-1 A~`` with the matrix
``A~`` of the virtual orbitals, and an expansion keeps that form with an effective inverse that has rows for virtual
orbitals, too (Filippi, Assaraf and Moroni, J. Chem. Phys. 144, 194105, 2016).

Derivatives of ``torch.linalg.slogdet`` are avoided: nested forward mode through it is silently wrong in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError


class SpinMatrices(NamedTuple):
    """The orbitals of one spin at its n electrons, for W walkers; M orbitals, the first n of them occupied.

    Attributes:
        values: orbitals ``(W, n, M)``.
        gradients: their gradients ``(3, W, n, M)``.
        laplacians: their Laplacians ``(W, n, M)``; empty where not requested.
        inverse: inverse ``(W, n, n)``, orbitals by electrons.
        ratios: ratios ``(W, n, M - n)``, occupied by virtual orbitals, of determinants with one orbital replaced to the
            reference.
        log_determinant: logarithm ``(W,)`` of the absolute value of the reference.
    """

    values: Tensor
    gradients: Tensor
    laplacians: Tensor
    inverse: Tensor
    ratios: Tensor
    log_determinant: Tensor


def spin_matrices(values: Tensor, gradients: Tensor, laplacians: Tensor) -> SpinMatrices:
    """Invert the occupied part of orbitals at electrons; shapes as in :class:`SpinMatrices`."""
    electrons = values.shape[1]
    occupied = values[:, :, :electrons]
    factors, pivots = torch.linalg.lu_factor(occupied)
    inverse = torch.linalg.lu_solve(factors, pivots, torch.eye(electrons, dtype=values.dtype).expand_as(occupied))
    log_determinant = factors.diagonal(dim1=1, dim2=2).abs().log().sum(1)
    return SpinMatrices(values, gradients, laplacians, inverse, inverse @ values[:, :, electrons:], log_determinant)


@dataclass(frozen=True)
class Excitations:
    """The occupation strings of one spin as excitations of the first one.

    Attributes:
        occupied: number of electrons.
        orbitals: number of orbitals.
        holes: occupied orbitals that each string leaves.
        particles: virtual orbitals that each string fills, counted from the first virtual one.
        signs: parity of the permutation of each string into increasing order.
    """

    occupied: int
    orbitals: int
    holes: tuple[tuple[int, ...], ...]
    particles: tuple[tuple[int, ...], ...]
    signs: tuple[int, ...]

    @classmethod
    def of_strings(cls, strings: Sequence[Sequence[int]], orbitals: int) -> Excitations:
        """Return the excitations of occupation lists in increasing order; the first must be the lowest orbitals.

        Raises:
            ConfigurationError: when the first string does not fill the lowest orbitals.
        """
        reference = list(range(len(strings[0])))
        holes, particles, signs = [], [], []
        for string in strings:
            left = [p for p in reference if p not in string]
            entered = [q for q in string if q not in reference]
            columns = list(reference)
            for p, q in zip(left, entered, strict=True):
                columns[p] = q
            inversions = sum(columns[i] > columns[j] for i in range(len(columns)) for j in range(i + 1, len(columns)))
            holes.append(tuple(left))
            particles.append(tuple(q - len(reference) for q in entered))
            signs.append(-1 if inversions % 2 else 1)
        if holes[0]:
            raise ConfigurationError(f"the first string must fill the lowest orbitals, got {list(strings[0])}")
        return cls(len(reference), orbitals, tuple(holes), tuple(particles), tuple(signs))

    def _orders(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield string numbers ``(S',)``, holes, particles ``(S', k)`` and signs of strings with k excited electrons."""
        for order in sorted({len(left) for left in self.holes} - {0}):
            chosen = [s for s, left in enumerate(self.holes) if len(left) == order]
            yield (
                torch.tensor(chosen),
                torch.tensor([self.holes[s] for s in chosen]),
                torch.tensor([self.particles[s] for s in chosen]),
                torch.tensor([float(self.signs[s]) for s in chosen], dtype=torch.float64),
            )

    def ratios(self, matrix: Tensor) -> Tensor:
        """Return the determinants of all strings over the reference ``(W, S)``, from ``(W, n, M - n)`` ratios."""
        result = matrix.new_ones(len(matrix), len(self.holes))
        for strings, holes, particles, signs in self._orders():
            result[:, strings] = signs * _determinants(_minors(matrix, holes, particles))
        return result

    def _cofactors(self, matrix: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return (strings, holes, particles, d ratio / d matrix entry ``(W, S')``) for all entries that matter."""
        found = []
        for strings, holes, particles, signs in self._orders():
            minors = _minors(matrix, holes, particles)
            order = holes.shape[1]
            for i in range(order):
                for j in range(order):
                    rows, columns = ([k for k in range(order) if k != left] for left in (i, j))
                    cofactor = _determinants(minors[:, :, rows][:, :, :, columns]) * (-1.0) ** (i + j)
                    found.append((strings, holes[:, i], particles[:, j], signs * cofactor))
        return found

    def ratio_derivatives(self, matrix: Tensor, direction: Tensor) -> Tensor:
        """Return the derivative ``(W, S)`` of :meth:`ratios` along ``direction``, of the shape of ``matrix``."""
        result = torch.zeros(len(matrix), len(self.holes), dtype=matrix.dtype)
        for strings, p, q, cofactor in self._cofactors(matrix):
            result.index_add_(1, strings, cofactor * direction[:, p, q])
        return result

    def weighted_gradient(self, matrix: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient ``(W, n, M - n)`` by ``matrix`` of the sum of ratios with ``weights`` ``(W, S)``."""
        flat = torch.zeros(len(matrix), matrix.shape[1] * matrix.shape[2], dtype=matrix.dtype)
        for strings, p, q, cofactor in self._cofactors(matrix):
            flat.index_add_(1, p * matrix.shape[2] + q, cofactor * weights[:, strings])
        return flat.reshape(matrix.shape)


def _minors(matrix: Tensor, holes: Tensor, particles: Tensor) -> Tensor:
    """Return the rows of the holes and columns of the particles ``(W, S, k, k)`` of ``(W, n, M - n)`` ratios."""
    return matrix[:, holes[:, :, None], particles[:, None, :]]


def _determinants(matrices: Tensor) -> Tensor:
    """Return determinants of ``(W, S, k, k)``; in closed form where they are small, which most are."""
    order = matrices.shape[-1]
    if order == 0:
        return matrices.new_ones(matrices.shape[:2])
    if order == 1:
        return matrices[..., 0, 0]
    if order == 2:
        return matrices[..., 0, 0] * matrices[..., 1, 1] - matrices[..., 0, 1] * matrices[..., 1, 0]
    return torch.linalg.det(matrices)


@dataclass(frozen=True)
class Expansion:
    """Coefficients of products of an up and a down determinant.

    Attributes:
        up: strings of spin up.
        down: strings of spin down.
        coefficients: coefficients ``(S_up, S_down)``.
    """

    up: Excitations
    down: Excitations
    coefficients: Tensor

    def free_entries(self) -> list[list[tuple[int, int]]]:
        """Return the variable entries of the coefficient matrix; one list holds those that spin symmetry makes equal.

        The reference's entry is the scale of all others, and entries that are nearly zero vanish by symmetry.
        """
        matrix = self.coefficients
        symmetric = matrix.shape[0] == matrix.shape[1] and bool(torch.allclose(matrix, matrix.T, atol=1e-6))
        free = []
        for i, j in (matrix.abs() > 1e-4).nonzero().tolist():
            if (i, j) == (0, 0) or (symmetric and j < i):
                continue
            free.append([(i, j), (j, i)] if symmetric and i != j else [(i, j)])
        return free


class DeterminantTerms(NamedTuple):
    """Contribution of the determinants to a wave function at W walkers.

    Attributes:
        log_absolute: logarithm ``(W,)`` of the absolute value.
        effective_inverses: matrices ``(W, M, n)`` of each spin: an operator on one electron i gives
            ``sum_a inverse[a, i] (O phi_a)(r_i)``, over the wave function.
        string_ratios: ratios ``(W, S)`` of each spin; empty for a single determinant.
        sum_of_ratios: ratio ``(W,)`` of the expansion to its first determinant.
    """

    log_absolute: Tensor
    effective_inverses: tuple[Tensor, Tensor]
    string_ratios: tuple[Tensor, Tensor]
    sum_of_ratios: Tensor


def determinant_terms(spins: tuple[SpinMatrices, SpinMatrices], expansion: Expansion | None) -> DeterminantTerms:
    """Combine the matrices of both spins into a single determinant (None) or an expansion."""
    up, down = spins
    log_absolute = up.log_determinant + down.log_determinant
    if expansion is None:
        nothing = up.values.new_empty(len(up.values), 0)
        padded = tuple(_with_virtual_rows(spin, None) for spin in spins)
        return DeterminantTerms(log_absolute, (padded[0], padded[1]), (nothing, nothing), torch.ones_like(log_absolute))
    ratios_up, ratios_down = expansion.up.ratios(up.ratios), expansion.down.ratios(down.ratios)
    partial_up = ratios_down @ expansion.coefficients.T
    total = (ratios_up * partial_up).sum(1)
    partial_down = ratios_up @ expansion.coefficients
    gradient_up = expansion.up.weighted_gradient(up.ratios, partial_up / total[:, None])
    gradient_down = expansion.down.weighted_gradient(down.ratios, partial_down / total[:, None])
    return DeterminantTerms(
        log_absolute + total.abs().log(),
        (_with_virtual_rows(up, gradient_up), _with_virtual_rows(down, gradient_down)),
        (ratios_up, ratios_down),
        total,
    )


def _with_virtual_rows(spin: SpinMatrices, gradient: Tensor | None) -> Tensor:
    """Return the effective inverse ``(W, M, n)``; ``gradient`` is that of the expansion by the ratios."""
    if gradient is None:
        virtual = spin.ratios.new_zeros(len(spin.ratios), spin.ratios.shape[2], spin.inverse.shape[2])
        return torch.cat([spin.inverse, virtual], dim=1)
    virtual = gradient.transpose(1, 2) @ spin.inverse
    return torch.cat([spin.inverse - spin.ratios @ virtual, virtual], dim=1)


def ratio_velocities(spin: SpinMatrices, operated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of a determinant and its ratios by a one-electron operator.

    For ``A(t) = A + t B`` with ``B = operated``, ``(W, n, M)`` for all orbitals: the trace ``(W,)`` of ``A^-1 B`` over the
    occupied ones, and the derivative ``(W, n, M - n)`` of the ratios by t.
    """
    electrons = spin.inverse.shape[1]
    product = spin.inverse @ operated
    trace = product[:, :, :electrons].diagonal(dim1=1, dim2=2).sum(1)
    return trace, product[:, :, electrons:] - product[:, :, :electrons] @ spin.ratios
