"""Densities of other libraries as potentials: zuko, nflows, normflows, torch.distributions, and similar objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.potential import Particles, Potential, PotentialMetadata
from ..core.units import thermal_energy

CoordinateMap = Callable[[Tensor], tuple[Any, Tensor]]
"""Function of positions ``(B, N, 3)`` nm: coordinates, one tensor ``(B, D)`` or several, and the log-determinant."""


class DensityPotential(Potential):
    """``U = -kT log p`` of a density of another library, for OpenMM, ASE and all other engines.

    Accepted are objects with ``log_prob(x)``, or ``log_prob(x, context)`` where a context is given (nflows, normflows,
    ``torch.distributions``); modules that return such an object when called (zuko: ``flow()``, ``flow(context)``); and objects
    with ``energy(x)``, a reduced energy ``-log p`` of shape ``(B,)`` or ``(B, 1)`` (bgflow).

    The energy has the symmetries of the density: a general density of Cartesian coordinates is neither translation- nor
    rotation-invariant, and holds a molecule in place. No model file can hold the potential, since a file contains no code of
    other libraries: OpenMM runs it, but cannot serialise the System.

    Args:
        density: density over flattened positions ``(B, 3 N)`` in nm in the order x0 y0 z0 x1 .., over ``(B, N, 3)`` where its
            event shape has two dimensions, or over ``coordinates``.
        particles: the N particles.
        temperature: temperature that turns the density into an energy, K.
        coordinates: map from positions to the coordinates of the density, with its log-determinant.
        context: condition ``(C,)`` of a conditional density.
        example: positions ``(B, N, 3)`` nm at which the density can be evaluated; random ones where None.

    Raises:
        ConfigurationError: for an object that is no density, or one that cannot be evaluated for these particles.
    """

    description: ClassVar[str] = "a density of another library"
    context: Tensor | None

    def __init__(
        self,
        density: Any,
        particles: Particles,
        temperature: float,
        *,
        coordinates: CoordinateMap | None = None,
        context: Tensor | None = None,
        example: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0.0:
            raise ConfigurationError(f"temperature must be positive (K), got {temperature}")
        self.metadata = PotentialMetadata(particles, temperature=float(temperature))
        self._kt = thermal_energy(temperature)
        self.density = density
        self.coordinates = coordinates
        self.register_buffer("context", context)
        self._log_density = _log_density(density)
        self._event_shape = _event_shape(density)
        self._distribution_dtype = _distribution_dtype(density)
        self._check(self.example_positions(2, torch.Generator().manual_seed(1)) if example is None else example)

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of positions ``(B, N, 3)`` in nm."""
        if self.coordinates is None:
            value, log_det = positions.flatten(1), None
        else:
            value, log_det = self.coordinates(positions)
            if not isinstance(value, Tensor):
                value = torch.cat(tuple(value), dim=1)
        if self._event_shape is not None and len(self._event_shape) == 2:
            value = value.reshape(len(value), *self._event_shape)
        result = self._log_density(value.to(self._dtype(value)), self.context)
        if result.shape == (len(positions), 1):
            result = result.squeeze(1)
        if result.shape != (len(positions),):
            raise ConfigurationError(
                f"the density gives log-probabilities of shape {tuple(result.shape)} for {len(positions)} configurations of "
                f"{tuple(value.shape[1:])} numbers; one per configuration is needed (torch.distributions.Independent makes one "
                "event of many numbers)"
            )
        return result.double() if log_det is None else result.double() + log_det

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol; see :meth:`Potential.forward`.

        Raises ConfigurationError when a cell or a global parameter is given: a density has none.
        """
        self.check_arguments(cell, global_parameters)
        return -self._kt * self.log_prob(positions)

    def _check(self, positions: Tensor) -> None:
        """Evaluate once; raise ConfigurationError with the library's reason where that fails."""
        try:
            with torch.no_grad():
                self.log_prob(positions)
        except ConfigurationError:
            raise
        except Exception as error:
            size = 3 * len(self.metadata.particles)
            over = (
                f"{size} numbers, 3 for each of {size // 3} particles"
                if self.coordinates is None
                else "its coordinates"
            )
            raise ConfigurationError(
                f"a {type(self.density).__name__} cannot be evaluated for {over}: {type(error).__name__}: {error}. If it is "
                "defined for some configurations only, give one as example="
            ) from error

    def _dtype(self, value: Tensor) -> torch.dtype:
        if not isinstance(self.density, nn.Module):
            return self._distribution_dtype or value.dtype
        found = (t for t in (*self.density.parameters(), *self.density.buffers()) if t.is_floating_point())
        return next((tensor.dtype for tensor in found), value.dtype)


def _log_density(density: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return log p as a function of values and context."""
    if hasattr(density, "log_prob"):

        def log_prob(value: Tensor, context: Tensor | None) -> Tensor:
            condition = () if context is None else (context.expand(len(value), *context.shape),)
            result: Tensor = density.log_prob(value, *condition)
            return result

        return log_prob
    if hasattr(density, "energy"):

        def minus_energy(value: Tensor, context: Tensor | None) -> Tensor:
            result: Tensor = -density.energy(value)
            return result

        return minus_energy
    if isinstance(density, nn.Module):

        def of_what_it_returns(value: Tensor, context: Tensor | None) -> Tensor:
            result: Tensor = (density() if context is None else density(context)).log_prob(value)
            return result

        return of_what_it_returns
    raise ConfigurationError(
        f"a {type(density).__name__} is no density: an object with log_prob(x) or energy(x) is needed, or a module that "
        "returns one when called (zuko)"
    )


def _event_shape(density: Any) -> torch.Size | None:
    return density.event_shape if isinstance(density, torch.distributions.Distribution) else None


def _distribution_dtype(density: Any) -> torch.dtype | None:
    """Return the dtype of a distribution's values, by drawing one; None where that is unknown."""
    if not isinstance(density, torch.distributions.Distribution):
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return density.sample().dtype
        except NotImplementedError:  # some distributions cannot be sampled
            return None
