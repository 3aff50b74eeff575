"""Many-electron wave functions: a Slater determinant or a small expansion, times a Jastrow factor.

Electrons are listed with spin up first, positions in bohr, energies in Hartree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ....core.errors import ConfigurationError
from ..molecule import Molecule
from .determinants import (
    DeterminantTerms,
    Expansion,
    SpinMatrices,
    determinant_terms,
    ratio_velocities,
    spin_matrices,
)
from .jastrow import Jastrow, JastrowTerms
from .slater_orbitals import SlaterOrbitals


class WaveFunctionValues(NamedTuple):
    """``ln|Psi|`` ``(W,)`` and its gradient by every electron ``(W, N, 3)``."""

    log_absolute: Tensor
    gradient: Tensor


class LocalEnergy(NamedTuple):
    """``ln|Psi|`` ``(W,)``, its gradient ``(W, N, 3)``, and kinetic and potential energy ``(W,)`` in Hartree."""

    log_absolute: Tensor
    gradient: Tensor
    kinetic: Tensor
    potential: Tensor

    @property
    def total(self) -> Tensor:
        """``(H Psi)/Psi``."""
        return self.kinetic + self.potential


class ParameterDerivatives(NamedTuple):
    """Derivatives by P parameters, at W walkers.

    Attributes:
        logarithms: derivatives ``(W, P)`` of ``ln|Psi|``.
        energies: derivatives ``(W, P)`` of the local energy.
        local_energy: local energies ``(W,)``.
    """

    logarithms: Tensor
    energies: Tensor
    local_energy: Tensor


class WaveFunction(Protocol):
    """Interface of a wave function for the sampler and the densities."""

    @property
    def molecule(self) -> Molecule:
        """Nuclei and electrons."""
        ...

    def evaluate(self, positions: Tensor) -> WaveFunctionValues:
        """Return ``ln|Psi|`` and its gradient at ``positions`` ``(W, N, 3)``."""
        ...

    def local_energy(self, positions: Tensor) -> LocalEnergy:
        """Return the local energy and its parts at ``positions`` ``(W, N, 3)``."""
        ...


def potential_energy(molecule: Molecule, positions: Tensor) -> Tensor:
    """Return the Coulomb energy ``(W,)`` of electrons ``(W, N, 3)`` and nuclei, including nuclear repulsion."""
    attraction = (molecule.charges / torch.linalg.vector_norm(positions[:, :, None] - molecule.centers, dim=3)).sum(
        (1, 2)
    )
    i, j = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
    repulsion = (1.0 / torch.linalg.vector_norm(positions[:, i] - positions[:, j], dim=2)).sum(1)
    return molecule.nuclear_repulsion + repulsion - attraction


@dataclass(frozen=True)
class SlaterJastrow:
    """Determinants of Slater-type orbitals times a Jastrow factor; without one, a Hartree-Fock determinant.

    Attributes:
        molecule: nuclei and electrons.
        orbitals: orbitals of each spin, occupied ones first; the expansion uses the virtual ones, or the optimiser of a single
            determinant mixes them into the occupied ones.
        jastrow: Jastrow factor, or None.
        jastrow_parameters: parameters ``(K,)`` of the Jastrow factor.
        expansion: expansion in determinants; None for a single one.
        mixing: pairs ``(M, 2)`` of occupied and virtual orbitals that the optimiser may mix, or None.
    """

    molecule: Molecule
    orbitals: SlaterOrbitals
    jastrow: Jastrow | None = None
    jastrow_parameters: Tensor | None = None
    expansion: Expansion | None = None
    mixing: Tensor | None = None

    def __post_init__(self) -> None:
        if self.jastrow is not None:
            parameters = self.jastrow_parameters
            if parameters is None:
                parameters = torch.zeros(self.jastrow.count, dtype=torch.float64)
                object.__setattr__(self, "jastrow_parameters", parameters)
            if len(parameters) != self.jastrow.count:
                raise ConfigurationError(
                    f"this Jastrow factor has {self.jastrow.count} parameters, got {len(parameters)}"
                )
        if self.mixing is not None and self.expansion is not None:
            raise ConfigurationError("orbitals can be optimised for a single determinant only: leave out the expansion")

    def evaluate(self, positions: Tensor) -> WaveFunctionValues:
        """See :meth:`WaveFunction.evaluate`."""
        spins = self._spins(positions, 1)
        terms = determinant_terms(spins, self.expansion)
        jastrow = self._jastrow(positions, 1)
        return WaveFunctionValues(terms.log_absolute + jastrow.value, _gradient(spins, terms) + jastrow.gradient)

    def local_energy(self, positions: Tensor) -> LocalEnergy:
        """See :meth:`WaveFunction.local_energy`."""
        spins = self._spins(positions, 2)
        terms = determinant_terms(spins, self.expansion)
        jastrow = self._jastrow(positions, 2)
        return self._energy(positions, spins, terms, jastrow)

    def spin_logarithms(self, positions: Tensor, down: Tensor) -> Tensor:
        """Return ``ln|Psi|`` ``(R, A)`` at ``positions`` ``(R, N, 3)`` for A distributions of the spins.

        Args:
            positions: positions in bohr.
            down: mask ``(R, A, N)`` of the electrons with spin down, whose number is the molecule's.
        """
        walkers, ways, _ = down.shape
        order = down.int().argsort(dim=2, stable=True)  # spin up first, as everywhere
        spins = []
        parts = order.split([self.molecule.spin_up, self.molecule.spin_down], 2)
        for members, coefficients in zip(parts, (self.orbitals.up, self.orbitals.down), strict=True):
            count = members.shape[2]
            chosen = coefficients if count else coefficients[:, :0]
            values = self.orbitals.functions.evaluate(positions.reshape(-1, 3), chosen).values
            values = values.reshape(-1, walkers, positions.shape[1]).permute(1, 2, 0)  # (R, N, M)
            rows = torch.arange(walkers)[:, None, None]
            nothing = positions.new_empty(0)
            spins.append(spin_matrices(values[rows, members].flatten(0, 1), nothing, nothing))
        logarithms = determinant_terms((spins[0], spins[1]), self.expansion).log_absolute.reshape(walkers, ways)
        if self.jastrow is None or self.jastrow_parameters is None:
            return logarithms
        usual = torch.arange(positions.shape[1]) >= self.molecule.spin_up
        both = torch.cat([usual.expand(walkers, 1, -1), down], 1)
        known = self.jastrow.spin_terms(positions, self.jastrow_parameters, both)
        return logarithms + self._jastrow(positions, 1).value[:, None] + known[:, 1:] - known[:, :1]

    @property
    def parameter_counts(self) -> tuple[int, int, int]:
        """Numbers of parameters of the Jastrow factor, of orbital mixing and of the expansion."""
        return (
            0 if self.jastrow is None else self.jastrow.count,
            0 if self.mixing is None else len(self.mixing) * (1 if self.orbitals.restricted else 2),
            0 if self.expansion is None else len(self.expansion.free_entries()),
        )

    def parameter_derivatives(self, positions: Tensor) -> ParameterDerivatives:
        """Return the derivatives for the linear method, in the order of :attr:`parameter_counts`."""
        spins = self._spins(positions, 2)
        terms = determinant_terms(spins, self.expansion)
        jastrow = self._jastrow(positions, 2)
        energy = self._energy(positions, spins, terms, jastrow)
        logarithms, energies = [], []
        if self.jastrow is not None:
            found = self.jastrow.parameter_derivatives(positions, energy.gradient)
            logarithms.append(found.values)
            energies.append(-0.5 * found.operated)
        for part in self._determinant_derivatives(spins, terms, jastrow.gradient):
            logarithms.append(part[0])
            energies.append(part[1])
        return ParameterDerivatives(torch.cat(logarithms, 1), torch.cat(energies, 1), energy.total)

    def stepped(self, step: Tensor) -> SlaterJastrow:
        """Return the wave function with its parameters changed by ``step``, in the order of :attr:`parameter_counts`."""
        jastrow, mixing, coefficients = step.split(self.parameter_counts)
        changed: SlaterJastrow = self
        if self.jastrow_parameters is not None:
            changed = replace(changed, jastrow_parameters=self.jastrow_parameters + jastrow)
        if self.mixing is not None:
            changed = replace(changed, orbitals=self._mixed(self.mixing, mixing))
        if self.expansion is not None:
            matrix = self.expansion.coefficients.clone()
            for value, entries in zip(coefficients, self.expansion.free_entries(), strict=True):
                for entry in entries:
                    matrix[entry] += value
            changed = replace(changed, expansion=replace(self.expansion, coefficients=matrix))
        return changed

    def _spins(self, positions: Tensor, derivatives: int) -> tuple[SpinMatrices, SpinMatrices]:
        up = self.molecule.spin_up
        found = []
        for part, coefficients in ((positions[:, :up], self.orbitals.up), (positions[:, up:], self.orbitals.down)):
            walkers, electrons = part.shape[:2]
            if electrons == 0:
                coefficients = coefficients[:, :0]
            values = self.orbitals.functions.evaluate(part.reshape(-1, 3), coefficients, derivatives)
            shape = (coefficients.shape[1], walkers, electrons)
            laplacians = values.laplacians.reshape(shape).permute(1, 2, 0) if derivatives >= 2 else values.laplacians
            found.append(
                spin_matrices(
                    values.values.reshape(shape).permute(1, 2, 0),
                    values.gradients.reshape(3, *shape).permute(0, 2, 3, 1),
                    laplacians,
                )
            )
        return found[0], found[1]

    def _jastrow(self, positions: Tensor, derivatives: int) -> JastrowTerms:
        if self.jastrow is None or self.jastrow_parameters is None:
            zero = positions.new_zeros(len(positions))
            return JastrowTerms(zero, torch.zeros_like(positions), zero)
        return self.jastrow.evaluate(positions, self.jastrow_parameters, derivatives)

    def _operated(self, spins: tuple[SpinMatrices, SpinMatrices], jastrow_gradient: Tensor) -> list[Tensor]:
        """Return for each spin ``-lap phi/2 - grad J . grad phi`` of all orbitals, ``(W, n, M)``."""
        up = self.molecule.spin_up
        return [
            -0.5 * spin.laplacians - torch.einsum("wic,cwia->wia", gradient, spin.gradients)
            for spin, gradient in zip(spins, (jastrow_gradient[:, :up], jastrow_gradient[:, up:]), strict=True)
        ]

    def _energy(
        self,
        positions: Tensor,
        spins: tuple[SpinMatrices, SpinMatrices],
        terms: DeterminantTerms,
        jastrow: JastrowTerms,
    ) -> LocalEnergy:
        kinetic = -0.5 * (jastrow.laplacian + jastrow.gradient.square().sum((1, 2)))
        for inverse, operated in zip(terms.effective_inverses, self._operated(spins, jastrow.gradient), strict=True):
            kinetic = kinetic + (inverse.transpose(1, 2) * operated).sum((1, 2))
        return LocalEnergy(
            terms.log_absolute + jastrow.value,
            _gradient(spins, terms) + jastrow.gradient,
            kinetic,
            potential_energy(self.molecule, positions),
        )

    def _determinant_derivatives(
        self, spins: tuple[SpinMatrices, SpinMatrices], terms: DeterminantTerms, jastrow_gradient: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield derivatives ``(W, P)`` of ln|Psi| and of the local energy by mixing or by the expansion's coefficients."""
        if self.mixing is None and self.expansion is None:
            return
        operated = self._operated(spins, jastrow_gradient)
        velocities = [ratio_velocities(spin, part)[1] for spin, part in zip(spins, operated, strict=True)]
        if self.mixing is not None:
            yield self._mixing_derivatives(self.mixing, spins, velocities)
        if self.expansion is not None:
            yield _coefficient_derivatives(self.expansion, spins, terms, velocities)

    def _mixing_derivatives(
        self, mixing: Tensor, spins: tuple[SpinMatrices, SpinMatrices], velocities: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        occupied, virtual = mixing.T
        ratios = [spin.ratios[:, occupied, virtual] for spin in spins if spin.inverse.shape[1]]
        changes = [
            velocity[:, occupied, virtual]
            for spin, velocity in zip(spins, velocities, strict=True)
            if spin.inverse.shape[1]
        ]
        if self.orbitals.restricted:
            return torch.stack(ratios).sum(0), torch.stack(changes).sum(0)
        return torch.cat(ratios, 1), torch.cat(changes, 1)

    def _mixed(self, mixing: Tensor, step: Tensor) -> SlaterOrbitals:
        found = []
        parts = [step, step] if self.orbitals.restricted else list(step.chunk(2))
        for part, coefficients, electrons in zip(
            parts,
            (self.orbitals.up, self.orbitals.down),
            (self.molecule.spin_up, self.molecule.spin_down),
            strict=True,
        ):
            changed = coefficients.clone()
            for value, (occupied, virtual) in zip(part, mixing.tolist(), strict=True):
                changed[:, occupied] += value * coefficients[:, electrons + virtual]
            found.append(changed)
        return self.orbitals.with_coefficients(found[0], found[1])


def _coefficient_derivatives(
    expansion: Expansion, spins: tuple[SpinMatrices, SpinMatrices], terms: DeterminantTerms, velocities: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return derivatives ``(W, P)`` of ln|Psi| and of the local energy by the expansion's free coefficients."""
    up, down = terms.string_ratios
    up_change = expansion.up.ratio_derivatives(spins[0].ratios, velocities[0])
    down_change = expansion.down.ratio_derivatives(spins[1].ratios, velocities[1])
    total = terms.sum_of_ratios
    coefficients = expansion.coefficients
    whole = ((up_change @ coefficients) * down + (up @ coefficients) * down_change).sum(1) / total
    logarithms, energies = [], []
    for entries in expansion.free_entries():
        i, j = torch.tensor(entries).T
        value = (up[:, i] * down[:, j]).sum(1) / total
        change = (up_change[:, i] * down[:, j] + up[:, i] * down_change[:, j]).sum(1) / total
        logarithms.append(value)
        energies.append(change - value * whole)
    return torch.stack(logarithms, 1), torch.stack(energies, 1)


def _gradient(spins: tuple[SpinMatrices, SpinMatrices], terms: DeterminantTerms) -> Tensor:
    """Return the gradient ``(W, N, 3)`` of the logarithm of the determinants."""
    return torch.cat(
        [
            torch.einsum("wai,cwia->wic", inverse, spin.gradients)
            for inverse, spin in zip(terms.effective_inverses, spins, strict=True)
        ],
        dim=1,
    )
