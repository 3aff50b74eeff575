"""Input from PySCF: mean-field and correlated orbitals, density matrices for comparison, integration grids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ConfigurationError, ConvergenceError, MissingDependencyError
from .molecule import Molecule

DEFAULT_BASIS = "aug-cc-pvtz"  # without diffuse functions the dipole of water is 0.06 D too large in CCSD
ORBITAL_KINDS = ("hartree-fock", "natural")
CHUNK = 8192
"""Number of points that are evaluated at once."""

_MOST_DETERMINANTS = 40_000  # of an active space, before small ones are left out


def require_pyscf() -> Any:
    """Return the module ``pyscf`` with the submodules that are used here.

    Raises:
        MissingDependencyError: where it is not installed.
    """
    try:
        import pyscf
        from pyscf import cc, dft, fci, gto, mcscf, mp, scf  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "quantum Monte Carlo starts from orbitals of PySCF and integrates on its grids: "
            "pip install 'flowbridge[densities]'"
        ) from error
    return pyscf


def pyscf_molecule(molecule: Molecule, basis: str = DEFAULT_BASIS, tight: bool = True) -> Any:
    """Return the molecule as ``pyscf.gto.Mole``.

    Args:
        molecule: nuclei and electrons.
        basis: name of a basis set of PySCF.
        tight: whether to uncontract the p functions of atoms from lithium on, and add some as tight as the core. Sets for
            valence correlation have none, and without them the core cannot be polarised: the Hellmann-Feynman force on lithium
                in
            LiH is 0.076 Hartree/bohr instead of -0.001 at the equilibrium distance (Hartree-Fock, cc-pVTZ).

    Raises:
        ConfigurationError: for a basis that PySCF lacks for these elements.
    """
    pyscf = require_pyscf()
    from pyscf.lib.exceptions import BasisNotFoundError

    labels = molecule.labels()
    try:
        functions = {
            label.rstrip("0123456789"): _functions(pyscf, label.rstrip("0123456789"), number, basis, tight)
            for label, number in zip(labels, molecule.numbers, strict=True)
        }
    except (BasisNotFoundError, KeyError) as error:
        raise ConfigurationError(f"PySCF has no basis {basis!r} for all of {', '.join(labels)}: {error}") from error
    return pyscf.gto.M(
        atom=[(label.rstrip("0123456789"), place) for label, place in zip(labels, molecule.positions, strict=True)],
        unit="Bohr",
        basis=functions,
        charge=molecule.charge,
        spin=molecule.spin,
        verbose=0,
    )


def _functions(pyscf: Any, symbol: str, number: int, basis: str, tight: bool) -> list[Any]:
    shells: list[Any] = list(pyscf.gto.basis.load(basis, symbol))
    if not tight or number < 3:
        return shells
    exponents = sorted({row[0] for shell in shells if shell[0] == 1 for row in shell[1:]})
    while exponents[-1] * 2.2 < 12.0 * number**2:
        exponents.append(exponents[-1] * 2.2)
    return [shell for shell in shells if shell[0] != 1] + [[1, [exponent, 1.0]] for exponent in exponents]


@dataclass(frozen=True)
class MolecularOrbitals:
    """Orbitals in Gaussian functions, for both spins.

    Attributes:
        mole: ``pyscf.gto.Mole`` of the orbitals.
        up: coefficients ``(K, M)`` of spin up, occupied orbitals first.
        down: the same for spin down; the same array where both spins share orbitals.
        energy: energy of the method, Hartree.
        hartree_fock_energy: energy of the Hartree-Fock reference, Hartree.
        method: name of the method.
        restricted: whether both spins have the same orbitals.
        strings: occupation strings of spin up and down of an expansion; None for a single determinant.
        coefficients: coefficients ``(S_up, S_down)`` of an expansion.
    """

    mole: Any
    up: np.ndarray[Any, Any]
    down: np.ndarray[Any, Any]
    energy: float
    hartree_fock_energy: float
    method: str
    restricted: bool
    strings: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] | None = None
    coefficients: np.ndarray[Any, Any] | None = None


def mean_field(molecule: Molecule, basis: str = DEFAULT_BASIS) -> Any:
    """Return a converged Hartree-Fock calculation of PySCF: restricted for closed shells, unrestricted otherwise.

    Raises:
        ConvergenceError: when it does not converge.
    """
    pyscf = require_pyscf()
    mole = pyscf_molecule(molecule, basis)
    method = (pyscf.scf.RHF if molecule.spin == 0 else pyscf.scf.UHF)(mole)
    method.conv_tol = 1e-10
    method.kernel()
    if not method.converged:
        method = method.newton()
        method.kernel()
    if not method.converged:
        raise ConvergenceError(
            f"Hartree-Fock in {basis} did not converge for {', '.join(molecule.labels())} with charge {molecule.charge} and "
            f"spin {molecule.spin}: check the geometry, charge and spin"
        )
    return method


def molecular_orbitals(
    molecule: Molecule, kind: str = "hartree-fock", basis: str = DEFAULT_BASIS, virtual: int = 0
) -> MolecularOrbitals:
    """Return orbitals for a single determinant.

    Args:
        molecule: nuclei and electrons.
        kind: ``"hartree-fock"``, or ``"natural"``: the most occupied natural orbitals of CCSD, whose determinant has
            dipole moments much closer to the exact ones (LiH: -2.32 instead of -2.36 atomic units, exact -2.29).
        basis: name of a basis set of PySCF.
        virtual: number of further orbitals to return.
    """
    if kind not in ORBITAL_KINDS:
        raise ConfigurationError(f"orbitals must be one of {', '.join(ORBITAL_KINDS)}, got {kind!r}")
    method = mean_field(molecule, basis)
    restricted = molecule.spin == 0
    energy = float(method.e_tot)
    if kind == "natural" and molecule.electrons > 1:
        density, energy = _coupled_cluster_density(method)
        spins = [density] if restricted else list(density)
        overlap = method.mol.intor("int1e_ovlp")
        found = [_natural_orbitals(matrix, overlap) for matrix in spins]
    else:
        found = [method.mo_coeff] if restricted else list(method.mo_coeff)
    up, down = found[0], found[-1]
    return MolecularOrbitals(
        method.mol,
        up[:, : molecule.spin_up + virtual],
        down[:, : molecule.spin_down + virtual],
        energy,
        float(method.e_tot),
        kind,
        restricted,
    )


def _natural_orbitals(density: np.ndarray[Any, Any], overlap: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return orbitals ``(K, M)`` of a density matrix, most occupied first."""
    values, vectors = np.linalg.eigh(overlap)
    if values[0] < 1e-10:
        raise ConvergenceError("the Gaussian functions are linearly dependent: choose a smaller basis")
    root = vectors * np.sqrt(values) @ vectors.T
    inverse = vectors / np.sqrt(values) @ vectors.T
    occupations, orbitals = np.linalg.eigh(root @ density @ root)
    found: np.ndarray[Any, Any] = inverse @ orbitals[:, np.argsort(-occupations)]
    return found


def _coupled_cluster_density(method: Any) -> tuple[Any, float]:
    """Return the CCSD density matrix in the atomic basis, (2, K, K) for UHF, and the energy."""
    pyscf = require_pyscf()
    solver = pyscf.cc.CCSD(method)
    solver.kernel()
    if not solver.converged:
        raise ConvergenceError("CCSD did not converge, so there are no natural orbitals: use orbitals='hartree-fock'")
    return _in_atomic_basis(solver, method), float(solver.e_tot)


def _in_atomic_basis(solver: Any, method: Any) -> Any:
    matrix = solver.make_rdm1()
    if isinstance(matrix, tuple):
        return np.array(
            [c @ m @ c.T for c, m in zip(method.mo_coeff, matrix, strict=True)]
        )  # spin-resolved, from an unrestricted reference
    return method.mo_coeff @ matrix @ method.mo_coeff.T


class ReferenceDensity(NamedTuple):
    """A density matrix of PySCF: the molecule, ``(2, K, K)`` for spin up and down, and the energy in Hartree."""

    mole: Any
    matrices: np.ndarray[Any, Any]
    energy: float


def reference_density(molecule: Molecule, method: str = "ccsd", basis: str = "aug-cc-pvtz") -> ReferenceDensity:
    """Return the density matrix of Hartree-Fock (``"hf"``), ``"ccsd"`` (unrelaxed), or ``"fci"`` in a basis.

    Raises:
        ConfigurationError: for another method.
        ConvergenceError: when it does not converge.
    """
    pyscf = require_pyscf()
    reference = mean_field(molecule, basis)
    if method == "hf" or (method == "ccsd" and molecule.electrons == 1):
        matrix, energy = reference.make_rdm1(), float(reference.e_tot)
    elif method == "ccsd":
        matrix, energy = _coupled_cluster_density(reference)
    elif method == "fci":
        if molecule.spin != 0:
            raise ConfigurationError("full configuration interaction is offered for closed shells: use method='ccsd'")
        solver = pyscf.fci.FCI(reference)
        energy, vector = solver.kernel()
        inner = solver.make_rdm1(vector, reference.mo_coeff.shape[1], reference.mol.nelectron)
        matrix = reference.mo_coeff @ inner @ reference.mo_coeff.T
    else:
        raise ConfigurationError(f"method must be hf, ccsd or fci, got {method!r}")
    matrices = np.array(matrix)
    return ReferenceDensity(
        reference.mol, matrices if matrices.ndim == 3 else np.array([matrices, matrices]) / 2.0, float(energy)
    )


def active_space_orbitals(
    molecule: Molecule, electrons: int, orbitals: int, basis: str = DEFAULT_BASIS, threshold: float = 5e-3
) -> MolecularOrbitals:  # fmt: skip
    """Return orbitals and coefficients of a CASSCF expansion; both spins share their orbitals, also in open shells.

    Args:
        molecule: nuclei and electrons.
        electrons: number of electrons in the active space, including those of an open shell.
        orbitals: number of orbitals in the active space.
        basis: name of a basis set of PySCF.
        threshold: largest coefficient of strings that are omitted.

    Raises:
        ConfigurationError: for an active space that does not fit.
        ConvergenceError: when CASSCF does not converge, or no determinant leads its expansion.
    """
    active = _active_electrons(molecule, electrons, orbitals)
    pyscf = require_pyscf()
    reference = mean_field(molecule, basis)
    start = _start_orbitals(reference)
    if molecule.spin:
        reference = pyscf.scf.ROHF(reference.mol)
        reference.kernel()
    solver = pyscf.mcscf.CASSCF(reference, orbitals, active)
    solver.natorb = True
    solver.kernel(start)
    if not solver.converged:
        raise ConvergenceError(
            f"CASSCF({electrons},{orbitals}) in {basis} did not converge: choose another active space"
        )
    core = solver.ncore
    coefficients, vector = _leading_first(solver, reference, active)
    strings, kept = [], []
    for spin, count in enumerate(active):
        lists = pyscf.fci.cistring.gen_occslst(range(orbitals), count)
        largest = np.abs(vector).max(1 - spin)
        kept.append([s for s in range(len(lists)) if s == 0 or largest[s] > threshold])
        strings.append(tuple(tuple(range(core)) + tuple(int(o) + core for o in lists[s]) for s in kept[-1]))
    coefficients = coefficients[:, : core + orbitals]
    return MolecularOrbitals(
        reference.mol,
        coefficients,
        coefficients,
        float(solver.e_tot),
        float(reference.e_tot),
        f"CASSCF({electrons},{orbitals})",
        True,
        (strings[0], strings[1]),
        vector[np.ix_(*kept)],
    )


def _active_electrons(molecule: Molecule, electrons: int, orbitals: int) -> tuple[int, int]:
    """Return the numbers of active electrons with spin up and down."""
    label = f"an active space of {electrons} electrons in {orbitals} orbitals"
    if electrons < 2 or electrons > molecule.electrons or (electrons - molecule.spin) % 2 or electrons < molecule.spin:
        raise ConfigurationError(
            f"{label} does not fit {molecule.electrons} electrons with spin {molecule.spin}: what is left below must be pairs, "
            "and the unpaired ones must be active"
        )
    up, down = (electrons + molecule.spin) // 2, (electrons - molecule.spin) // 2
    if orbitals < up or math.comb(orbitals, up) * math.comb(orbitals, down) == 1:
        raise ConfigurationError(
            f"{label} with spin {molecule.spin} has no more than one determinant: give more orbitals"
        )
    if math.comb(orbitals, up) * math.comb(orbitals, down) > _MOST_DETERMINANTS:
        raise ConfigurationError(
            f"{label} has {math.comb(orbitals, up) * math.comb(orbitals, down)} determinants; expansions here are small, up "
            f"to {_MOST_DETERMINANTS}: give fewer orbitals"
        )
    return up, down


def _leading_first(
    solver: Any, reference: Any, active: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a CASSCF's orbitals, ordered so that the lowest of each spin form the largest determinant, and its vector."""
    pyscf = require_pyscf()
    vector = np.asarray(solver.ci)
    lists = [pyscf.fci.cistring.gen_occslst(range(solver.ncas), count) for count in active]
    row, column = np.unravel_index(np.abs(vector).argmax(), vector.shape)
    up, down = ([int(o) for o in found[place]] for found, place in zip(lists, (row, column), strict=True))
    if not set(down) <= set(up):
        raise ConvergenceError(
            "the largest determinant of this CASSCF is an open shell of singlet kind, which expansions here do not start from: "
            "choose another active space or spin"
        )
    order = [*down, *(o for o in up if o not in down), *(o for o in range(solver.ncas) if o not in up)]
    coefficients = np.array(solver.mo_coeff)
    first = solver.ncore
    coefficients[:, first : first + solver.ncas] = coefficients[:, [first + o for o in order]]
    again = pyscf.mcscf.CASCI(reference, solver.ncas, active)
    again.natorb = again.canonicalization = False
    again.kernel(coefficients)
    return coefficients, np.asarray(again.ci)


def _start_orbitals(reference: Any) -> np.ndarray[Any, Any]:
    """Return MP2's natural orbitals: canonical virtual orbitals of a diffuse basis do not correlate."""
    pyscf = require_pyscf()
    solver = pyscf.mp.MP2(reference)
    solver.kernel()
    matrix = np.asarray(_in_atomic_basis(solver, reference))
    return _natural_orbitals(matrix.sum(0) if matrix.ndim == 3 else matrix, reference.mol.intor("int1e_ovlp"))


class Quadrature(NamedTuple):
    """Points ``(P, 3)`` in bohr and weights ``(P,)`` of an integration over all space."""

    points: Tensor
    weights: Tensor

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield at most :data:`CHUNK` points with their weights at a time."""
        return zip(self.points.split(CHUNK), self.weights.split(CHUNK), strict=True)


def becke_quadrature(molecule: Molecule, level: int = 4) -> Quadrature:
    """Return PySCF's atom-centred grid with Becke's partition (A. D. Becke, J. Chem. Phys. 88, 2547, 1988)."""
    pyscf = require_pyscf()
    grid = pyscf.dft.gen_grid.Grids(pyscf_molecule(molecule, tight=False))
    grid.level = level
    grid.prune = None  # pruned shells near nuclei spoil forces there
    grid.build(with_non0tab=False)
    weights = torch.tensor(grid.weights, dtype=torch.float64)
    points = torch.tensor(np.asarray(grid.coords), dtype=torch.float64)
    kept = weights != 0.0  # padding
    return Quadrature(points[kept], weights[kept])
