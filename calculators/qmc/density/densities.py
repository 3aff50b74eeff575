"""Electron densities: the interface of all models, and models in closed form.

A density is positive, so a model gives its logarithm with gradient and Laplacian; a model that was fitted also gives
jackknife replicas, from which :mod:`flowbridge.calculators.qmc.properties.properties` computes error bars. Atomic units
throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..electronic_structure import CHUNK, Quadrature, ReferenceDensity, mean_field
from ..molecule import Molecule
from ..wave_function.atomic_functions import AtomicFunctions
from ..wave_function.slater_orbitals import SlaterOrbitals, orthonormal
from ..wave_function.wave_function import SlaterJastrow

_SMALLEST = 1e-280  # of a density, where the logarithm of an underflowed orbital would be infinite


class LogDensity(NamedTuple):
    """``ln rho`` ``(P,)``, its gradient ``(P, 3)`` and Laplacian ``(P,)``; empty where not requested."""

    values: Tensor
    gradients: Tensor
    laplacians: Tensor


class DensityModel(ABC):
    """An electron density in e/bohr^3.

    Attributes:
        molecule: nuclei of the density.
        electrons: integral of the density.
        replicas: number of jackknife replicas; 0 for a density without statistical error.
    """

    molecule: Molecule
    electrons: float
    replicas: int = 0

    @abstractmethod
    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """Return ``ln rho`` at ``points`` ``(P, 3)`` in bohr, with 0, 1 or 2 derivatives."""

    def replica_logs(self, points: Tensor) -> Tensor:
        """Return ``ln rho`` of the jackknife replicas, ``(R, P)``."""
        return points.new_empty(0, len(points))

    def log_rho(self, points: Tensor) -> Tensor:
        """Return ``ln rho`` ``(P,)``."""
        return torch.cat([self.evaluate(part).values for part in points.split(CHUNK)])

    def rho(self, points: Tensor) -> Tensor:
        """Return the density ``(P,)`` in e/bohr^3."""
        return self.log_rho(points).exp()

    def gradient(self, points: Tensor) -> Tensor:
        """Return the gradient of the density ``(P, 3)`` in e/bohr^4."""
        parts = [self.evaluate(part, 1) for part in points.split(CHUNK)]
        return torch.cat([part.gradients * part.values.exp()[:, None] for part in parts])

    def laplacian(self, points: Tensor) -> Tensor:
        """Return the Laplacian of the density ``(P,)`` in e/bohr^5."""
        parts = [self.evaluate(part, 2) for part in points.split(CHUNK)]
        return torch.cat([(part.laplacians + part.gradients.square().sum(1)) * part.values.exp() for part in parts])

    def with_replicas(self, points: Tensor) -> Tensor:
        """Return the density ``(1 + R, P)``: itself first, then its jackknife replicas."""
        return torch.cat(
            [
                torch.cat([self.evaluate(part).values[None], self.replica_logs(part)]).exp()
                for part in points.split(CHUNK)
            ],
            dim=1,
        )


class OrbitalDensity(DensityModel):
    """``sum_k n_k phi_k^2`` with Slater-type orbitals: the exact density of a determinant.

    Args:
        molecule: nuclei and electrons.
        functions: Slater functions.
        coefficients: coefficients ``(K, M)`` of the orbitals.
        occupations: occupations ``(M,)`` of the orbitals.
    """

    def __init__(
        self, molecule: Molecule, functions: AtomicFunctions, coefficients: Tensor, occupations: Tensor
    ) -> None:
        self.molecule, self.functions = molecule, functions
        self.coefficients, self.occupations = coefficients, occupations
        self.electrons = float(occupations.sum())

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`."""
        found = self.functions.evaluate(points, self.coefficients, derivatives)
        return _from_orbitals(found.values, found.gradients, found.laplacians, self.occupations, derivatives)


class GaussianDensity(DensityModel):
    """A density matrix of PySCF.

    Args:
        molecule: nuclei and electrons.
        mole: ``pyscf.gto.Mole`` of the matrix.
        matrix: density matrix ``(K, K)`` in its atomic basis.
    """

    def __init__(self, molecule: Molecule, mole: Any, matrix: Any) -> None:
        self.molecule, self._mole = molecule, mole
        matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self._matrix = 0.5 * (matrix + matrix.T)
        self.electrons = float((self._matrix * torch.as_tensor(mole.intor("int1e_ovlp"))).sum())

    @classmethod
    def from_reference(cls, molecule: Molecule, reference: ReferenceDensity) -> GaussianDensity:
        """Return the total density of a reference calculation."""
        return cls(molecule, reference.mole, reference.matrices.sum(0))

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`. A correlated matrix that is not positive gives tiny values far away."""
        name = ("GTOval_sph", "GTOval_sph_deriv1", "GTOval_sph_deriv2")[derivatives]
        found = torch.as_tensor(self._mole.eval_gto(name, points.numpy()))
        values = found if derivatives == 0 else found[0]
        product = values @ self._matrix
        rho = (product * values).sum(1).clamp_min(_SMALLEST)
        empty = rho.new_empty(0)
        if derivatives == 0:
            return LogDensity(rho.log(), empty, empty)
        gradients = 2.0 * torch.stack([(product * found[1 + axis]).sum(1) for axis in range(3)], 1) / rho[:, None]
        if derivatives == 1:
            return LogDensity(rho.log(), gradients, empty)
        laplacian = 2.0 * (product * (found[4] + found[7] + found[9])).sum(1)
        for axis in range(3):
            laplacian = laplacian + 2.0 * ((found[1 + axis] @ self._matrix) * found[1 + axis]).sum(1)
        return LogDensity(rho.log(), gradients, laplacian / rho - gradients.square().sum(1))

    def potential(self, points: Tensor) -> Tensor:
        """Return ``int rho/|r - r'|`` ``(P,)`` in Hartree/e at ``points`` ``(P, 3)`` in bohr, in closed form."""
        parts = [torch.as_tensor(self._mole.intor("int1e_grids", grids=part.numpy())) for part in points.split(256)]
        return torch.cat([torch.einsum("pij,ij->p", part, self._matrix) for part in parts])


@lru_cache(maxsize=4)
def hartree_fock_density(molecule: Molecule) -> GaussianDensity:
    """Return PySCF's Hartree-Fock density: the reference that the potentials of other densities differ from."""
    method = mean_field(molecule, "cc-pvtz")
    matrix = method.make_rdm1()
    return GaussianDensity(molecule, method.mol, matrix if matrix.ndim == 2 else matrix.sum(0))


class SumDensity(DensityModel):
    """The sum of two densities, such as those of both spins; replicas are summed one by one.

    Args:
        up: density of spin up.
        down: density of spin down.
    """

    def __init__(self, up: DensityModel, down: DensityModel) -> None:
        self.up, self.down = up, down
        self.molecule = up.molecule
        self.electrons = up.electrons + down.electrons
        self.replicas = max(up.replicas, down.replicas)

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`."""
        first, second = self.up.evaluate(points, derivatives), self.down.evaluate(points, derivatives)
        values = torch.logaddexp(first.values, second.values)
        empty = values.new_empty(0)
        if derivatives == 0:
            return LogDensity(values, empty, empty)
        a, b = (first.values - values).exp(), (second.values - values).exp()
        gradients = a[:, None] * first.gradients + b[:, None] * second.gradients
        if derivatives == 1:
            return LogDensity(values, gradients, empty)
        curvature = sum(w * (part.laplacians + part.gradients.square().sum(1)) for w, part in ((a, first), (b, second)))
        return LogDensity(values, gradients, curvature - gradients.square().sum(1))

    def replica_logs(self, points: Tensor) -> Tensor:
        """See :meth:`DensityModel.replica_logs`."""
        parts = [
            part.replica_logs(points) if part.replicas else part.evaluate(points).values.expand(self.replicas, -1)
            for part in (self.up, self.down)
        ]
        return torch.logaddexp(parts[0], parts[1])


def _from_orbitals(
    values: Tensor, gradients: Tensor, laplacians: Tensor, occupations: Tensor, derivatives: int
) -> LogDensity:
    """Return ``ln sum_k n_k phi_k^2`` from orbitals ``(M, P)`` and their derivatives."""
    weighted = occupations[:, None] * values
    rho = (weighted * values).sum(0).clamp_min(_SMALLEST)
    empty = rho.new_empty(0)
    if derivatives == 0:
        return LogDensity(rho.log(), empty, empty)
    slopes = (2.0 * (weighted * gradients).sum(1) / rho).T
    if derivatives == 1:
        return LogDensity(rho.log(), slopes, empty)
    curvature = 2.0 * (weighted * laplacians).sum(0)
    curvature = curvature + 2.0 * (occupations[:, None] * gradients.square()).sum((0, 1))
    return LogDensity(rho.log(), slopes, curvature / rho - slopes.square().sum(1))


def determinant_density(
    molecule: Molecule, orbitals: SlaterOrbitals, grid: Quadrature, spin: str = "total"
) -> OrbitalDensity:
    """Return the density of the occupied orbitals of both spins, or of one, ``"up"`` or ``"down"``.

    Orbitals that an optimiser mixed are no longer orthonormal; they are orthonormalised on ``grid``, which does not change the
    determinant.
    """
    parts = {"up": (orbitals.up, molecule.spin_up), "down": (orbitals.down, molecule.spin_down)}
    chosen = list(parts.values()) if spin == "total" else [parts[spin]]
    matrices = [orthonormal(orbitals.functions, c[:, :n], grid) for c, n in chosen if n]
    if orbitals.restricted and spin == "total" and molecule.spin == 0:
        return OrbitalDensity(
            molecule, orbitals.functions, matrices[0], torch.full((molecule.spin_up,), 2.0, dtype=torch.float64)
        )
    joint = torch.cat(matrices, 1)
    return OrbitalDensity(molecule, orbitals.functions, joint, torch.ones(joint.shape[1], dtype=torch.float64))


def base_density(wave_function: SlaterJastrow, grid: Quadrature, spin: str = "total") -> OrbitalDensity:
    """Return the density of the reference determinant of a wave function, from which a fit starts.

    Active virtual orbitals of an expansion have the weights of the strings that fill them.
    """
    expansion = wave_function.expansion
    if expansion is None:
        return determinant_density(wave_function.molecule, wave_function.orbitals, grid, spin)
    coefficients = expansion.coefficients / torch.linalg.vector_norm(expansion.coefficients)
    occupations = torch.zeros(wave_function.orbitals.up.shape[1], dtype=torch.float64)
    pairs = ((expansion.up, coefficients.square().sum(1)), (expansion.down, coefficients.square().sum(0)))
    for label, (strings, weights) in zip(("up", "down"), pairs, strict=True):
        if spin not in ("total", label):
            continue
        for weight, holes, particles in zip(weights, strings.holes, strings.particles, strict=True):
            occupations[: strings.occupied] += weight
            for hole in holes:
                occupations[hole] -= weight
            for particle in particles:
                occupations[strings.occupied + particle] += weight
    return OrbitalDensity(
        wave_function.molecule, wave_function.orbitals.functions, wave_function.orbitals.up, occupations
    )
