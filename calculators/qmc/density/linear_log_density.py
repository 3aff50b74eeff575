"""The linear model of a logarithmic density: ``ln rho(r) = ln rho_base(r) + sum_k c_k b_k(r)``.

The functions b have zero slope at nuclei, so that the exact cusps of the base density remain. For the fit see
:mod:`~flowbridge.calculators.qmc.density.convex_fit`.
"""

from __future__ import annotations

from torch import Tensor

from ....core.errors import ConfigurationError
from ..electronic_structure import Quadrature
from ..molecule import Molecule
from ..wave_function.atomic_functions import AtomicFunctions, Shell
from ..wave_function.sampling import ElectronSamples
from ..wave_function.symmetry import allowed_combinations
from .convex_fit import DensityFitSettings, convex_fit
from .densities import DensityModel, LogDensity, OrbitalDensity


class LinearLogDensity(DensityModel):
    """A base density times the exponential of a linear combination.

    Args:
        base: density to correct.
        functions: functions on nuclei.
        contraction: combinations b ``(K, Q)`` of the functions.
        coefficients: coefficients ``(1 + R, Q)`` of the fit, then of its jackknife replicas.
        shifts: normalising constants ``(1 + R,)``, added to the logarithm.
        electrons: integral of the density.
    """

    def __init__(
        self,
        base: OrbitalDensity,
        functions: AtomicFunctions,
        contraction: Tensor,
        coefficients: Tensor,
        shifts: Tensor,
        electrons: float,
    ) -> None:
        self.base, self.functions, self.contraction = base, functions, contraction
        self.coefficients, self.shifts = coefficients, shifts
        self.molecule, self.electrons = base.molecule, electrons
        self.replicas = len(coefficients) - 1
        self._combined = contraction @ coefficients.T  # (K, 1 + R)

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`."""
        base = self.base.evaluate(points, derivatives)
        found = self.functions.evaluate(points, self._combined[:, :1], derivatives)
        return LogDensity(
            base.values + found.values[0] + self.shifts[0],
            base.gradients + found.gradients[:, 0].T if derivatives >= 1 else base.gradients,
            base.laplacians + found.laplacians[0] if derivatives >= 2 else base.laplacians,
        )

    def replica_logs(self, points: Tensor) -> Tensor:
        """See :meth:`DensityModel.replica_logs`."""
        corrections = self.functions.evaluate(points, self._combined[:, 1:]).values
        return self.base.evaluate(points).values + corrections + self.shifts[1:, None]


def correction_functions(molecule: Molecule, grid: Quadrature, density: Tensor) -> tuple[AtomicFunctions, Tensor]:
    """Return the functions on nuclei that correct a logarithmic density, and the combinations that its symmetry allows."""
    shells: list[Shell] = []
    for center, number in enumerate(molecule.numbers):
        shells += [Shell(center, 0, "soft_radius", 1.0), Shell(center, 0, "soft_logarithm", 1.0)]
        shells.append(Shell(center, 1, "soft_radius", -1.0))
        exponent = 0.04
        while exponent < 6.0 * number**2:
            shells.append(Shell(center, 0, "gaussian", exponent))
            if exponent < 4.0 * number:
                shells.append(Shell(center, 1, "gaussian", exponent))
            if exponent < 2.0 * number:
                shells.append(Shell(center, 2, "gaussian", exponent))
            exponent *= 2.7
    return AtomicFunctions(molecule.centers, shells), allowed_combinations(molecule.centers, shells, grid, density)


def fit_linear_log_density(
    samples: ElectronSamples,
    base: OrbitalDensity,
    grid: Quadrature,
    settings: DensityFitSettings | None = None,
    spin: str = "total",
) -> LinearLogDensity:
    """Fit the density of all electrons (``spin="total"``), or of those with spin ``"up"`` or ``"down"``.

    Args:
        samples: configurations with scores.
        base: density of the same molecule and electrons to correct.
        grid: quadrature for the normalisation.
        settings: see :class:`~flowbridge.calculators.qmc.density.convex_fit.DensityFitSettings`.
        spin: spin of the electrons.

    Raises:
        ConfigurationError: for a base of another molecule, or fewer walkers than groups.
        ConvergenceError: when Newton's method does not converge.
    """
    molecule = samples.molecule
    if not molecule.same_as(base.molecule):
        raise ConfigurationError("the base density belongs to another molecule than the samples")
    functions, contraction = correction_functions(molecule, grid, base.rho(grid.points))

    def combined(points: Tensor, derivatives: int) -> tuple[Tensor, Tensor]:
        found = functions.evaluate(points, contraction, derivatives)
        return found.values, found.gradients

    electrons = samples.electrons_of(spin)
    found = convex_fit(samples, electrons, base, combined, grid, settings or DensityFitSettings())
    count = float(electrons.stop - electrons.start)
    return LinearLogDensity(base, functions, contraction, found.coefficients, found.shifts, count)
