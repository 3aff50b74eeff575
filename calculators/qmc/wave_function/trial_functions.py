"""Trial wave functions: Slater-Jastrow functions of a molecule, ready to be optimised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.errors import ConfigurationError
from ..electronic_structure import (
    CHUNK,
    DEFAULT_BASIS,
    ORBITAL_KINDS,
    MolecularOrbitals,
    Quadrature,
    active_space_orbitals,
    becke_quadrature,
    molecular_orbitals,
)
from ..molecule import Molecule
from .atomic_functions import AtomicFunctions, Shell
from .determinants import Excitations, Expansion
from .jastrow import Jastrow
from .slater_orbitals import SlaterOrbitals, slater_orbitals
from .symmetry import allowed_combinations
from .wave_function import SlaterJastrow

_POLAR_EXPONENTS = (0.05, 0.25, 1.2, 6.0, 30.0, 150.0)  # bohr^-2
_POLARISING_EXPONENTS = (0.25, 1.2, 6.0, 30.0, 150.0)  # bohr^-2
_COUPLING = 1e-4  # Hartree; two orbitals with a weaker coupling have different symmetries


@dataclass(frozen=True)
class TrialSettings:
    """Settings of a trial wave function.

    Attributes:
        orbitals: ``"natural"`` (of CCSD), ``"hartree-fock"``.
        basis: basis set of the Gaussian orbitals that are refitted.
        jastrow: whether to multiply by a Jastrow factor; without one the function is a mean-field determinant.
        active_space: numbers of electrons and orbitals of a CASSCF expansion; None for a single determinant.
        virtual: number of virtual orbitals that the optimiser may mix into the occupied ones; 0 for fixed orbitals.
        grid_level: level of PySCF's grids, 0 to 9.

    Raises:
        ConfigurationError: for settings that exclude each other.
    """

    orbitals: str = "natural"
    basis: str = DEFAULT_BASIS
    jastrow: bool = True
    active_space: tuple[int, int] | None = None
    virtual: int = 0
    grid_level: int = 4

    def __post_init__(self) -> None:
        if self.orbitals not in ORBITAL_KINDS:
            raise ConfigurationError(f"orbitals must be one of {', '.join(ORBITAL_KINDS)}, got {self.orbitals!r}")
        if self.virtual < 0 or not 0 <= self.grid_level <= 9:
            raise ConfigurationError(f"virtual must be 0 or more and grid_level from 0 to 9, got {self}")
        if self.virtual and (self.active_space is not None or not self.jastrow):
            raise ConfigurationError(
                "orbitals are optimised for a single determinant with a Jastrow factor: give virtual=0 or no active space"
            )


@dataclass(frozen=True)
class Trial:
    """A trial wave function and its original orbitals.

    Attributes:
        wave_function: wave function to optimise or to sample.
        orbitals: orbitals of PySCF before the refit.
        grid: quadrature of the molecule.
    """

    wave_function: SlaterJastrow
    orbitals: MolecularOrbitals
    grid: Quadrature


def trial_wave_function(molecule: Molecule, settings: TrialSettings | None = None) -> Trial:
    """Return a Slater-Jastrow function whose Jastrow parameters are zero.

    Raises:
        ConfigurationError: for settings that do not fit the molecule.
        ConvergenceError: when PySCF does not converge, or the orbitals cannot be refitted.
        MissingDependencyError: without PySCF.
    """
    chosen = settings or TrialSettings()
    grid = becke_quadrature(molecule, chosen.grid_level)
    if chosen.active_space is not None:
        orbitals = active_space_orbitals(molecule, *chosen.active_space, basis=chosen.basis)
    else:
        orbitals = molecular_orbitals(molecule, chosen.orbitals, chosen.basis, chosen.virtual)
    fitted = slater_orbitals(molecule, orbitals, grid)
    return Trial(
        SlaterJastrow(
            molecule,
            fitted,
            jastrow_factor(molecule, grid, _density_on_grid(molecule, fitted, grid)) if chosen.jastrow else None,
            expansion=_expansion(orbitals),
            mixing=_mixing(molecule, fitted, grid) if chosen.virtual else None,
        ),
        orbitals,
        grid,
    )


def _density_on_grid(molecule: Molecule, orbitals: SlaterOrbitals, grid: Quadrature) -> Tensor:
    """Return the density ``(P,)`` of the occupied orbitals on the grid."""
    density = torch.empty_like(grid.weights)
    for points, part in zip(grid.points.split(CHUNK), density.split(CHUNK), strict=True):
        up = orbitals.functions.evaluate(points, orbitals.up[:, : molecule.spin_up]).values
        down = orbitals.functions.evaluate(points, orbitals.down[:, : molecule.spin_down]).values
        part.copy_(up.square().sum(0) + down.square().sum(0))
    return density


def jastrow_factor(molecule: Molecule, grid: Quadrature, density: Tensor) -> Jastrow:
    """Return the Jastrow factor for a molecule; its one-electron terms have the symmetry of ``density`` on ``grid``."""
    elements = sorted(set(molecule.numbers))
    shells, contraction = one_electron_terms(molecule, grid, density)
    polarising = None
    if molecule.spin and molecule.spin_down:
        odd = _polarising_terms(molecule)
        polarising = AtomicFunctions(molecule.centers, odd), allowed_combinations(molecule.centers, odd, grid, density)
    return Jastrow(
        molecule.centers,
        torch.tensor([elements.index(number) for number in molecule.numbers]),
        molecule.spin_up,
        molecule.electrons,
        AtomicFunctions(molecule.centers, shells),
        contraction,
        polarising,
    )


def one_electron_terms(molecule: Molecule, grid: Quadrature, density: Tensor) -> tuple[list[Shell], Tensor]:
    """Return the functions of one electron in the Jastrow factor, and their combinations with a parameter each.

    On each nucleus: powers of u, a radius and its logarithm (together they change exponents of orbitals), and vectors
    within Gaussians, from the valence to the core, that polarise it.
    """
    shells: list[Shell] = []
    for center, number in enumerate(molecule.numbers):
        shells += [Shell(center, 0, "soft_radius", 1.0), Shell(center, 0, "soft_logarithm", 1.0)]
        if molecule.electrons == 1:
            shells += [Shell(center, 0, "rational_power", float(power)) for power in (1, 2, 3)]
        shells += [Shell(center, 1, "gaussian", a) for a in _POLAR_EXPONENTS if a <= max(1.2, 4.0 * number**2)]
    return shells, allowed_combinations(molecule.centers, shells, grid, density)


def _polarising_terms(molecule: Molecule) -> list[Shell]:
    """Return the functions by which electrons of both spins in an open shell may differ, from the valence to the core."""
    shells: list[Shell] = []
    for center, number in enumerate(molecule.numbers):
        shells += [Shell(center, 0, "soft_radius", 1.0), Shell(center, 0, "soft_logarithm", 1.0)]
        shells += [Shell(center, 0, "gaussian", a) for a in _POLARISING_EXPONENTS if a <= max(1.2, 4.0 * number**2)]
    return shells


def _expansion(orbitals: MolecularOrbitals) -> Expansion | None:
    if orbitals.strings is None or orbitals.coefficients is None:
        return None
    up, down = (Excitations.of_strings(strings, orbitals.up.shape[1]) for strings in orbitals.strings)
    matrix = torch.as_tensor(orbitals.coefficients).clone()
    return Expansion(up, down, matrix / matrix[0, 0])


def _mixing(molecule: Molecule, orbitals: SlaterOrbitals, grid: Quadrature) -> Tensor:
    """Return pairs of an occupied and a virtual orbital of the same symmetry.

    Kinetic and nuclear energy are totally symmetric: where neither couples two orbitals, symmetry keeps them apart, and a
    parameter for them would be noise.
    """
    # For an open shell both spins share the list, which ends with the occupied orbitals of spin down.
    occupied = molecule.spin_up if orbitals.restricted else molecule.spin_down
    coupled = torch.zeros(occupied, orbitals.up.shape[1] - molecule.spin_up, dtype=torch.bool)
    spins = ((orbitals.up, molecule.spin_up), (orbitals.down, molecule.spin_down))
    for coefficients, electrons in spins[:1] if orbitals.restricted else spins:
        matrices = torch.zeros(2, electrons, coefficients.shape[1] - electrons, dtype=torch.float64)
        for points, weights in grid.blocks():
            found = orbitals.functions.evaluate(points, coefficients, 1)
            attraction = (molecule.charges / torch.cdist(points, molecule.centers)).sum(1)
            left, right = found.values[:electrons], found.values[electrons:]
            matrices[0] += (left * (weights * attraction)) @ right.T
            for axis in range(3):
                matrices[1] += (found.gradients[axis, :electrons] * weights) @ found.gradients[axis, electrons:].T
        coupled |= (matrices.abs() > _COUPLING).any(0)[:occupied]
    return coupled.nonzero()
