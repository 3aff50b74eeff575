"""The symmetry of a density: functions on nuclei that it forbids would only add noise.

Point groups are not needed. An angular function on a nucleus is used if the reference density has it there: functions along the
axis of a linear molecule, none in a closed-shell atom. Rotations and reflections that map the nuclei onto each other and leave
the density unchanged are symmetry operations, and functions are combined accordingly: equivalent atoms get equal functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..electronic_structure import Quadrature
from .atomic_functions import AtomicFunctions, Shell, solid_harmonics

_EXPONENTS = (0.1, 0.3, 1.0, 3.0)  # bohr^-2; exponents of the Gaussians that probe the density near and far
_DEGREES = (0, 1, 2)
_THRESHOLD = 2e-3
_SAME_PLACE = 1e-3  # bohr


def allowed_combinations(centers: Tensor, shells: Sequence[Shell], grid: Quadrature, density: Tensor) -> Tensor:
    """Return ``(K, Q)``: combinations of the K functions of ``shells`` that the symmetry of a density allows.

    Functions of the same degree, family and parameter are combined with each other, and the columns are orthonormal.

    Args:
        centers: nuclei ``(A, 3)`` in bohr.
        shells: functions on them.
        grid: quadrature.
        density: density ``(P,)`` on the grid.
    """
    moments = _moments(centers, grid, density)
    operations = _operations(centers, moments)
    starts, count = [], 0
    for shell in shells:
        starts.append(count)
        count += 2 * shell.degree + 1
    groups: dict[tuple[int, str, float], list[int]] = {}
    for index, shell in enumerate(shells):
        groups.setdefault((shell.degree, shell.family, shell.parameter), []).append(index)
    columns: list[Tensor] = []
    known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for (degree, _, _), members in groups.items():
        places = tuple(shells[index].center for index in members)
        if (degree, places) not in known:
            known[degree, places] = _combinations(places, degree, moments[degree], operations)
        block = known[degree, places]
        size = 2 * degree + 1
        rows = torch.cat([torch.arange(starts[index], starts[index] + size) for index in members])
        wide = torch.zeros(count, block.shape[1], dtype=torch.float64)
        wide[rows] = block
        columns.append(wide)
    return torch.cat(columns, 1)


def _combinations(
    places: tuple[int, ...], degree: int, moments: Tensor, operations: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return orthonormal columns for the functions of one kind on the nuclei ``places``."""
    allowed = torch.block_diag(*(_directions(moments[center]) if degree else torch.ones(1, 1) for center in places))
    size = 2 * degree + 1
    average = torch.zeros(len(places) * size, len(places) * size, dtype=torch.float64)
    for rotation, images in operations:
        block = _harmonic_rotation(rotation, degree)
        for position, center in enumerate(places):
            image = places.index(int(images[center]))
            average[image * size : (image + 1) * size, position * size : (position + 1) * size] += block
    vectors, strengths, _ = torch.linalg.svd(average / len(operations) @ allowed.double(), full_matrices=False)
    found = vectors[:, strengths > 0.5]
    return torch.where(found.abs() > 1e-9, found, torch.zeros_like(found))  # zeros are not evaluated


def _moments(centers: Tensor, grid: Quadrature, density: Tensor) -> list[Tensor]:
    """Return the density's relative moments with functions on each nucleus, ``(A, E, 2 degree + 1)`` for each degree."""
    found = []
    for degree in _DEGREES:
        shells = [Shell(center, degree, "gaussian", a) for center in range(len(centers)) for a in _EXPONENTS]
        probes = AtomicFunctions(centers, shells)
        totals = torch.zeros(probes.count, dtype=torch.float64)
        norms = torch.zeros_like(totals)
        for points, weights in Quadrature(grid.points, grid.weights * density).blocks():
            values = probes.evaluate(points).values
            totals += values @ weights
            norms += values.abs() @ weights.abs()
        shape = (len(centers), len(_EXPONENTS), 2 * degree + 1)
        found.append(totals.reshape(shape) / norms.reshape(shape).amax((0, 2), keepdim=True))
    return found


def _directions(moments: Tensor) -> Tensor:
    """Return angular functions ``(M, Q)`` that a density with ``moments`` ``(E, M)`` about a nucleus has there."""
    _, strengths, vectors = torch.linalg.svd(moments, full_matrices=False)
    return vectors[strengths > _THRESHOLD].T


def _operations(centers: Tensor, moments: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return rotations ``(3, 3)`` with the images ``(A,)`` of the nuclei that leave the density unchanged."""
    found = []
    away = centers - centers.mean(0)
    for rotation in _candidates(away):
        distances = torch.cdist(away @ rotation.T, away)
        images = distances.argmin(1)
        if float(distances.amin(1).max()) > _SAME_PLACE or len(set(images.tolist())) < len(centers):
            continue
        turned = (
            float((part[images] - part @ _harmonic_rotation(rotation, degree).T).abs().max())
            for degree, part in enumerate(moments)
        )
        if max(turned) < _THRESHOLD:
            found.append((rotation, images))
    return found


def _candidates(away: Tensor) -> list[Tensor]:
    """Return orthogonal matrices, including all that map the places ``away`` ``(A, 3)`` onto each other.

    A line, which has infinitely many, gets the identity and the inversion: angular functions around the axis are excluded
    already.
    """
    frames = [
        (first, second, torch.linalg.cross(first, second))
        for first, second in itertools.permutations(away, 2)
        if float(torch.linalg.vector_norm(torch.linalg.cross(first, second))) > 1e-2
    ]
    identity = torch.eye(3, dtype=torch.float64)
    if not frames:
        return [identity, -identity]
    inverse = torch.linalg.inv(torch.stack(frames[0]).T)
    products = (
        torch.stack((first, second, sign * normal)).T @ inverse for first, second, normal in frames for sign in (1, -1)
    )
    return [product for product in products if float((product @ product.T - identity).abs().max()) < _SAME_PLACE]


def _harmonic_rotation(rotation: Tensor, degree: int) -> Tensor:
    """Return the matrix ``(M, M)`` from solid harmonics on a nucleus to those on its image."""
    points = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = torch.stack(solid_harmonics(points, degree)[0]).T
    turned = torch.stack(solid_harmonics(rotation.T @ points, degree)[0]).T
    return torch.linalg.lstsq(here, turned).solution
