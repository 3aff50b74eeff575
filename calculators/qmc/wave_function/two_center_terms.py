"""Terms of the Jastrow factor for two electrons at two nuclei: ``sum_(i != j) u_iA^l u_jB^m`` with ``u = 1/(1 + r^2/2)``.

They keep one electron of a bond at each end (left-right correlation), which terms of single nuclei describe badly: without them
a single determinant for H2 at its equilibrium distance has a Hellmann-Feynman force of 0.004 Hartree/bohr, as if the bond were
too short.

Pairs of nuclei of the same elements at the same distance share parameters, so that J has the symmetry of the molecule.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POWERS = (1, 2)
_SAME_DISTANCE = 0.02  # bohr


class TwoCenterTerms:
    """The terms of one molecule.

    Functions of an electron are flattened to F = 2 A: ``u_A`` and ``u_A^2`` of each of A nuclei.

    Args:
        centers: nuclei ``(A, 3)`` in bohr.
        elements: index ``(A,)`` of the element of each nucleus among the molecule's elements.
    """

    def __init__(self, centers: Tensor, elements: Tensor) -> None:
        size = len(_POWERS)
        self._width = size * len(centers)
        matrices: list[Tensor] = []
        for pairs in _classes(centers, elements):
            a, b = pairs[0]
            alike = bool(elements[a] == elements[b])
            for left in range(size):
                for right in range(left if alike else 0, size):
                    entries = [(a * size + left, b * size + right) for a, b in pairs]
                    if alike:  # neither end is the first one
                        entries += [(a * size + right, b * size + left) for a, b in pairs]
                    matrices.append(self._symmetric(entries))
        self.count = len(matrices)
        # (P, F, F): which products of functions a parameter multiplies
        self._matrices = torch.stack([torch.zeros(self._width, self._width, dtype=torch.float64), *matrices])[1:]

    def fields(self, functions: Tensor, parameters: Tensor) -> Tensor:
        """Return the factor of each function of each electron ``(W, N, F)``: sums over the other electrons."""
        others = functions.sum(1, keepdim=True) - functions
        return others @ torch.einsum("p,pfg->fg", parameters, self._matrices)

    def derivatives(self, functions: Tensor, operated: Tensor) -> tuple[Tensor, Tensor]:
        """Return every term and the result of a one-electron operator on it, summed over electrons, both ``(W, P)``.

        Args:
            functions: functions ``(W, N, F)``.
            operated: results ``(W, N, F)`` of the operator on each function.
        """
        others = functions.sum(1, keepdim=True) - functions
        products, changes = functions.transpose(1, 2) @ others, operated.transpose(1, 2) @ others
        return (
            0.5 * torch.einsum("wfg,pfg->wp", products, self._matrices),
            torch.einsum("wfg,pfg->wp", changes, self._matrices),
        )

    def _symmetric(self, entries: list[tuple[int, int]]) -> Tensor:
        matrix = torch.zeros(self._width, self._width, dtype=torch.float64)
        for row, column in entries:
            matrix[row, column] = matrix[column, row] = 1.0
        return matrix


def _classes(centers: Tensor, elements: Tensor) -> list[list[tuple[int, int]]]:
    """Return lists of pairs of nuclei with the same elements and distance, the lower element first."""
    found: list[tuple[tuple[int, int], float, list[tuple[int, int]]]] = []
    for a in range(len(centers)):
        for b in range(a + 1, len(centers)):
            first, second = (a, b) if elements[a] <= elements[b] else (b, a)
            kind = (int(elements[first]), int(elements[second]))
            distance = float(torch.linalg.vector_norm(centers[a] - centers[b]))
            for known, length, pairs in found:
                if known == kind and abs(length - distance) < _SAME_DISTANCE:
                    pairs.append((first, second))
                    break
            else:
                found.append((kind, distance, [(first, second)]))
    return [pairs for _, _, pairs in found]
