"""The contract of invertible maps with known volume change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn


class Transformed(NamedTuple):
    """Result of a bijection: the mapped value and ``log |det J|`` of that direction for each configuration."""

    value: Tensor
    log_det: Tensor


class Triangular(NamedTuple):
    """Result of a layer that changes some coordinates one by one and reads the others.

    Attributes:
        value: mapped coordinates ``(B, D)``.
        log_det: ``(B,)``.
        slopes: derivatives of the changed coordinates by themselves ``(B, D)``; 1 for the others.
        changed: 1 for changed coordinates, 0 for the others, ``(D,)``.
    """

    value: Tensor
    log_det: Tensor
    slopes: Tensor
    changed: Tensor


class Mixing(NamedTuple):
    """Result of a linear layer.

    Attributes:
        value: mapped coordinates ``(B, D)``.
        log_det: ``(B,)``.
        solve_transposed: ``u -> v`` with ``J^T v = u`` for the derivative J of ``value``, both ``(B, D)``.
    """

    value: Tensor
    log_det: Tensor
    solve_transposed: Callable[[Tensor], Tensor]


class Bijection(nn.Module):
    """An invertible map between latent and data coordinates, optionally conditioned on a context.

    ``forward`` goes latent -> data, ``inverse`` data -> latent. The log-determinant always belongs to the direction
    taken. A subclass says in its docstring which direction is closed form.
    """

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """Map latent to data: ``(B, D)`` and context ``(B, C)`` -> value ``(B, D)``, log_det ``(B,)``."""
        raise TypeError(f"{type(self).__name__} defines no forward (latent to data) map")

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """Map data to latent: ``(B, D)`` and context ``(B, C)`` -> value ``(B, D)``, log_det ``(B,)``."""
        raise TypeError(f"{type(self).__name__} defines no inverse (data to latent) map")

    def layer_inverse(self, value: Tensor, context: Tensor | None = None) -> Triangular | Mixing:
        """Map data to latent as :meth:`inverse` does, with what solves for its derivative; of single layers only."""
        raise TypeError(f"{type(self).__name__} is not a layer whose derivative is triangular, or that of a linear map")


class Chain(Bijection):
    """Bijections one after the other; the list is in the order latent -> data."""

    def __init__(self, bijections: list[Bijection]) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        log_det = value.new_zeros(value.shape[0])
        for bijection in self.bijections:
            value, change = bijection(value, context)
            log_det = log_det + change
        return Transformed(value, log_det)

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        log_det = value.new_zeros(value.shape[0])
        for bijection in cast(Iterable[Bijection], reversed(self.bijections)):
            value, change = bijection.inverse(value, context)
            log_det = log_det + change
        return Transformed(value, log_det)


class ElementwiseTransform(nn.Module):
    """A family of increasing maps of one coordinate whose parameters a conditioner gives.

    Attributes:
        parameter_count: number of unconstrained parameters of one coordinate.
        parameters_apart: whether networks put the values of one parameter for all coordinates side by side in memory
            (best where parameters are used one by one), instead of all parameters of one coordinate (best where they are
            used as vectors). The shape ``(B, D, P)`` is the same.
    """

    parameter_count: int
    parameters_apart: bool = False

    def forward(self, value: Tensor, parameters: Tensor) -> Transformed:
        """Map latent to data.

        Args:
            value: ``(B, D)``.
            parameters: ``(B, D, P)`` with ``P = parameter_count``, unconstrained.

        Returns:
            The mapped value ``(B, D)`` and the logarithm of the derivative, per coordinate ``(B, D)``.
        """
        raise TypeError(f"{type(self).__name__} defines no forward (latent to data) map")

    def inverse(self, value: Tensor, parameters: Tensor) -> Transformed:
        """Map data to latent; shapes as in :meth:`forward`."""
        raise TypeError(f"{type(self).__name__} defines no inverse (data to latent) map")

    def initial_parameters(self, coordinates: int, generator: torch.Generator) -> Tensor:
        """Return ``(coordinates, P)`` parameters at which training should start."""
        return torch.zeros(coordinates, self.parameter_count)
