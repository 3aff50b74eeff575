"""Which angular functions around a nucleus a density has: those that symmetry forbids would only add noise.

Nothing is asked about point groups. An angular function is kept if the reference density has it: around an atom of a linear
molecule that leaves the axis, in a closed-shell atom nothing, without symmetry everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .atomic_functions import AtomicFunctions, Shell
from .electronic_structure import Quadrature

_EXPONENTS = (0.1, 0.3, 1.0, 3.0)  # bohr^-2; of the Gaussians that look at the density near and far
_THRESHOLD = 2e-3


def allowed_combinations(centers: Tensor, shells: Sequence[Shell], grid: Quadrature, density: Tensor) -> Tensor:
    """Return ``(K, Q)``: combinations of the K functions of ``shells`` that the symmetry of a density allows.

    Args:
        centers: nuclei ``(A, 3)`` in bohr.
        shells: functions on them.
        grid: to integrate on.
        density: ``(P,)`` on the grid.
    """
    kinds = sorted({(shell.center, shell.degree) for shell in shells})
    directions = {kind: _directions(centers, kind[0], kind[1], grid, density) for kind in kinds}
    columns = sum(directions[shell.center, shell.degree].shape[1] for shell in shells)
    rows = sum(2 * shell.degree + 1 for shell in shells)
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    row = column = 0
    for shell in shells:
        block = directions[shell.center, shell.degree]
        matrix[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return matrix


def _directions(centers: Tensor, center: int, degree: int, grid: Quadrature, density: Tensor) -> Tensor:
    if degree == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    probes = AtomicFunctions(centers, [Shell(center, degree, "gaussian", a) for a in _EXPONENTS])
    size = 2 * degree + 1
    moments = torch.zeros(len(_EXPONENTS) * size, dtype=torch.float64)
    norms = torch.zeros_like(moments)
    for points, weights in zip(grid.points.split(8192), (grid.weights * density).split(8192), strict=True):
        values = probes.evaluate(points).values
        moments += values @ weights
        norms += values.abs() @ weights.abs()
    scaled = moments.reshape(-1, size) / norms.reshape(-1, size).amax(1, keepdim=True)
    _, strengths, vectors = torch.linalg.svd(scaled, full_matrices=False)
    return vectors[strengths > _THRESHOLD].T
