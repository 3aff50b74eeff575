"""The minimum of a crystal's energy and the curvature there, which define a harmonic crystal."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ...core.errors import ConvergenceError
from .bodies import BodyConfiguration
from .crystal import Crystal, from_flat
from .energies import BodyEnergy
from .harmonic import flat_dimension

_DIFFERENCE = 1e-4  # nm or tangent of half an angle: central differences of forces in double precision


class RelaxedCrystal(NamedTuple):
    """A crystal whose sites are a minimum of the energy.

    Attributes:
        crystal: the sites.
        energy: kJ/mol at the minimum.
        curvature: ``(6 M - 3, 6 M - 3)`` second derivatives in kJ/mol by flat crystal coordinates.
    """

    crystal: Crystal
    energy: float
    curvature: Tensor


def relaxed(
    energy: BodyEnergy, configuration: BodyConfiguration, box: Tensor | None = None, *, tolerance: float = 0.1
) -> RelaxedCrystal:
    """Return the minimum of the energy next to a configuration ``(1, M, ...)``, the first body held, with its curvature.

    Args:
        energy: energy in double precision (OpenMM's Reference platform), or the differences of forces are noise.
        configuration: start of the minimisation.
        box: ``(3,)`` nm.
        tolerance: largest component of the gradient at the minimum, kJ/mol by flat coordinate.

    Raises:
        ConvergenceError: when the minimum is not reached, or is none: a curvature is not positive.
    """
    crystal = Crystal(configuration.positions[0], configuration.orientations[0], box)
    start = np.zeros(flat_dimension(crystal.count))
    found = minimize(
        lambda flat: _value_and_gradient(energy, crystal, flat), start, jac=True, method="L-BFGS-B",
        options={"maxiter": 2000, "maxcor": 30, "ftol": 1e-15, "gtol": tolerance},
    )  # fmt: skip
    if not np.abs(found.jac).max() <= tolerance:
        raise ConvergenceError(
            f"no minimum after {found.nit} steps: the gradient is {np.abs(found.jac).max():.3g} (allowed: {tolerance:g}): "
            f"{found.message}. Start from a better structure"
        )
    placed = crystal.configuration(from_flat(torch.as_tensor(found.x).unsqueeze(0), crystal.count))
    at_minimum = Crystal(placed.positions[0], placed.orientations[0], box)
    curvature = _curvature(energy, at_minimum)
    lowest = float(torch.linalg.eigvalsh(curvature)[0])
    if not lowest > 0.0:
        raise ConvergenceError(
            f"the lowest curvature at the minimum is {lowest:.3g} kJ/mol: it is not stable, or something moves freely"
        )
    return RelaxedCrystal(at_minimum, float(found.fun), curvature)


def _value_and_gradient(
    energy: BodyEnergy, crystal: Crystal, flat: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
    values, gradients = _gradients(energy, crystal, torch.as_tensor(flat).unsqueeze(0))
    return float(values[0]), gradients[0].numpy()


def _gradients(energy: BodyEnergy, crystal: Crystal, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return energies ``(B,)`` in kJ/mol and their gradients ``(B, D)`` at flat coordinates."""
    leaf = flat.detach().requires_grad_(True)
    with torch.enable_grad():
        values = energy.energy_of(crystal.configuration(from_flat(leaf, crystal.count)))
        (gradients,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradients


def _curvature(energy: BodyEnergy, crystal: Crystal) -> Tensor:
    shifts = _DIFFERENCE * torch.eye(flat_dimension(crystal.count), dtype=torch.float64)
    _, gradients = _gradients(energy, crystal, torch.cat([shifts, -shifts]))
    forward, backward = gradients.chunk(2)
    matrix = (forward - backward) / (2.0 * _DIFFERENCE)
    return 0.5 * (matrix + matrix.mT)
