"""Smooth maps of the real line with both directions in closed form: affine, and affine followed by sinh-arcsinh.

The sinh-arcsinh map ``sinh(d asinh(x) + e)`` changes tail weight (d) and skewness (e) and stays infinitely
differentiable with an analytic inverse (Jones and Pewsey, Biometrika 96, 761 (2009)); subtracting ``sinh e`` keeps 0
fixed, so that the affine part alone shifts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bijection import ElementwiseTransform, Transformed


class Affine(ElementwiseTransform):
    """``latent = (data - t) exp(g)`` with ``g = 2 tanh(s / 2)``; closed form both ways."""

    parameter_count = 2
    parameters_apart = True

    def inverse(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.inverse`."""
        shift, log_scale = parameters[..., 0], 2.0 * torch.tanh(0.5 * parameters[..., 1])
        return Transformed((value - shift) * log_scale.exp(), log_scale)

    def forward(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.forward`."""
        shift, log_scale = parameters[..., 0], 2.0 * torch.tanh(0.5 * parameters[..., 1])
        return Transformed(value * torch.exp(-log_scale) + shift, -log_scale)


class SinhArcsinh(ElementwiseTransform):
    """Affine, then ``latent = sinh(d asinh(y) + e) - sinh(e)``; closed form both ways.

    d lies between exp(-1/2) and exp(1/2), e between -2 and 2. With ``r = latent + sinh(e)`` the derivative is
    ``d sqrt((1 + r^2) / (1 + y^2))``.
    """

    parameter_count = 4
    parameters_apart = True

    @staticmethod
    def _read(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the shift, the logarithm of the scale, log d and e."""
        shift, scale, tail, skew = parameters.unbind(-1)
        return shift, 2.0 * torch.tanh(0.5 * scale), 0.5 * torch.tanh(tail), 2.0 * torch.tanh(0.5 * skew)

    def inverse(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.inverse`."""
        shift, log_scale, log_tail, skew = self._read(parameters)
        y = (value - shift) * log_scale.exp()
        raised = torch.sinh(log_tail.exp() * torch.asinh(y) + skew)
        ratio = (1.0 + raised.square()) / (1.0 + y.square())
        return Transformed(raised - torch.sinh(skew), log_scale + log_tail + 0.5 * ratio.log())

    def forward(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.forward`."""
        shift, log_scale, log_tail, skew = self._read(parameters)
        raised = value + torch.sinh(skew)
        y = torch.sinh((torch.asinh(raised) - skew) * torch.exp(-log_tail))
        ratio = (1.0 + y.square()) / (1.0 + raised.square())
        return Transformed(y * torch.exp(-log_scale) + shift, 0.5 * ratio.log() - log_tail - log_scale)
