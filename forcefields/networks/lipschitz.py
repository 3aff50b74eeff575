"""Lipschitz control: no linear layer stretches any difference of its inputs by more than a bound.

The gradient of the network is then bounded wherever beads go, which keeps the force field tame between and beyond the data. The
bound is kept by projection after every optimiser step (Gouk et al., Machine Learning 110, 393 (2021)): a weight matrix of
spectral norm s is divided by ``max(1, s / bound)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ITERATIONS = 2


class SpectralBound:
    """Projects the linear layers of a network.

    While training, the spectral norm is estimated by power iteration that goes on where the last step stopped, from below and
    within a percent or so; :func:`project_exactly` ends the training.

    Args:
        layers: layers to bound.
        bound: upper bound of each layer's spectral norm.
    """

    def __init__(self, layers: list[nn.Linear], bound: float) -> None:
        self.layers, self.bound = layers, bound
        self.vectors = [_start(layer.weight) for layer in layers]

    @torch.no_grad()
    def project(self) -> None:
        """Scale down every layer whose norm is above the bound."""
        for number, layer in enumerate(self.layers):
            weight, vector = layer.weight, self.vectors[number]
            for _ in range(_ITERATIONS):
                vector = nn.functional.normalize(weight.T @ (weight @ vector), dim=0)
            self.vectors[number] = vector
            norm = torch.linalg.vector_norm(weight @ vector)
            weight.div_((norm / self.bound).clamp_min(1.0))

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the state that a resumed training needs for the same numbers."""
        return {"vectors": self.vectors}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Continue from :meth:`state_dict`."""
        self.vectors = state["vectors"]


@torch.no_grad()
def project_exactly(layers: list[nn.Linear], bound: float) -> None:
    """Scale down every layer whose spectral norm, by singular value decomposition, is above the bound."""
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.double(), 2)
        layer.weight.div_((norm / bound).clamp_min(1.0).to(layer.weight.dtype))


def _start(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return nn.functional.normalize(torch.randn(weight.shape[1], generator=generator, dtype=weight.dtype), dim=0)
