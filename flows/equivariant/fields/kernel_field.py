"""Kernel dynamics: a pair force whose shape is learned, with its divergence in closed form."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ....core.configuration import StrictModel
from .pair_geometry import FARTHEST, SOFTENING, PairGeometry
from .vector_fields import VectorField, Velocity


class KernelFieldSettings(StrictModel):
    """Kernels of distance and time.

    Attributes:
        distances: kernels of the distance.
        longest: reduced distance of the last one.
        crowding: power of their spacing; 1 is uniform (DW4), 2 has them denser at short distances (LJ13).
        width: width of each, in units of the distance between neighbours.
        times: kernels of the time, uniform from 0 to 1.
        time_width: width of each, in units of time.
    """

    distances: int = Field(default=50, ge=2)
    longest: float = Field(default=8.0, gt=0.0)
    crowding: float = Field(default=1.0, ge=1.0)
    width: float = Field(default=2.0, gt=0.0)
    times: int = Field(default=10, ge=2)
    time_width: float = Field(default=0.3, gt=0.0)


class KernelField(VectorField):
    """``v_i = sum_j (x_i - x_j) phi(d_ij, t)`` with ``phi = sum_kl K_k(d) W_kl T_l(t) + sum_l b_l T_l(t)``.

    Normalised Gaussians K and T (arXiv 2006.02425, section 5). At each time it is the gradient of a pair potential; nothing
    depends on more than two particles at once. The divergence is ``sum over i != j of d phi'(d) + D phi(d)``.
    """

    centres: Tensor
    time_centres: Tensor

    def __init__(self, count: int, dimension: int, settings: KernelFieldSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.count, self.dimension = settings, count, dimension
        self.geometry = PairGeometry(count)
        steps = torch.linspace(0.0, 1.0, settings.distances, dtype=torch.float64)
        centres = settings.longest * steps**settings.crowding
        widths = settings.width * torch.gradient(centres)[0]
        self.register_buffer("centres", centres.float())
        self.register_buffer("time_centres", torch.linspace(0.0, 1.0, settings.times))
        self.log_widths = nn.Parameter(widths.log().float())
        self.log_time_widths = nn.Parameter(torch.full((settings.times,), math.log(settings.time_width)))
        noise = torch.randn(settings.distances, settings.times, generator=generator)
        self.weights = nn.Parameter(0.1 / settings.distances * noise)
        self.biases = nn.Parameter(torch.zeros(settings.times))

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        difference, distance = self.geometry.separations(x)
        kernels, _ = _normalised(distance, self.centres, self.log_widths)
        return self._moved(difference, self._combined(kernels, time, constant=True))

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """See :meth:`VectorField.with_divergence`; in closed form."""
        difference, distance = self.geometry.separations(x)
        kernels, slopes = _normalised(distance, self.centres, self.log_widths)
        phi = self._combined(kernels, time, constant=True)
        slope = self._combined(slopes, time, constant=False)
        # d' = |x_ij|^2 / d rather than d, because distances are softened.
        stretch = difference.square().sum(-1) / distance.squeeze(-1)
        divergence = 2.0 * (stretch * slope + self.dimension * phi).sum(0)
        return Velocity(self._moved(difference, phi), divergence)

    def _moved(self, difference: Tensor, phi: Tensor) -> Tensor:
        return self.geometry.gather_signed(difference * phi.unsqueeze(-1)).transpose(0, 1)

    def _combined(self, kernels: Tensor, time: Tensor, *, constant: bool) -> Tensor:
        """Return ``(P, B)``, kernels of distance ``(P, B, K)`` weighed by those of time."""
        t = time.to(kernels.dtype).expand(kernels.shape[1]).unsqueeze(-1)
        of_time, _ = _normalised(t, self.time_centres, self.log_time_widths)
        total = (kernels * (of_time @ self.weights.T)).sum(-1)
        return total + of_time @ self.biases if constant else total


def _normalised(value: Tensor, centres: Tensor, log_widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gaussians of ``value`` ``(.., 1)`` divided by their sum, and their derivatives, both ``(.., K)``."""
    inverse = torch.exp(-log_widths)
    z = (value - centres) * inverse
    gaussians = torch.exp(-z.square().clamp(max=FARTHEST))
    slopes = -2.0 * z * inverse * gaussians
    total = gaussians.sum(-1, keepdim=True) + SOFTENING
    kernels = gaussians / total
    return kernels, (slopes - kernels * slopes.sum(-1, keepdim=True)) / total
