"""Coupling layers: some coordinates are transformed, the others and a context say how."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bijection import Bijection, ElementwiseTransform, Transformed
from .conditioners import Conditioner


class Coupling(Bijection):
    """Transform the coordinates ``transformed`` with parameters that the remaining ones and a context determine.

    Each direction is closed form if the transform's is.

    Args:
        dimension: number of coordinates D.
        transformed: indices of the coordinates to transform.
        transform: family of elementwise maps.
        hidden: widths of the conditioner's hidden layers.
        generator: of initial weights.
        conditioning: indices that the conditioner sees; all others where None.
        encoder: module that turns the seen coordinates into features (Fourier features of angles); None: as they are.
        features: number of features that ``encoder`` gives; ignored without one.
        context: number of context features.
        wrap: whether transformed coordinates are angles in turns, to be wrapped to [0, 1).
    """

    transformed: Tensor
    others: Tensor
    seen: Tensor
    restore: Tensor

    def __init__(
        self,
        dimension: int,
        transformed: list[int],
        transform: ElementwiseTransform,
        hidden: tuple[int, ...],
        generator: torch.Generator,
        *,
        conditioning: list[int] | None = None,
        encoder: nn.Module | None = None,
        features: int = 0,
        context: int = 0,
        wrap: bool = False,
    ) -> None:
        super().__init__()
        others = [i for i in range(dimension) if i not in set(transformed)]
        seen = others if conditioning is None else conditioning
        restore = torch.argsort(torch.tensor(transformed + others))
        self.register_buffer("transformed", torch.tensor(transformed), persistent=False)
        self.register_buffer("others", torch.tensor(others, dtype=torch.long), persistent=False)
        self.register_buffer("seen", torch.tensor(seen, dtype=torch.long), persistent=False)
        self.register_buffer("restore", restore, persistent=False)
        self.transform = transform
        self.encoder = encoder
        self.wrap = wrap
        start = transform.initial_parameters(len(transformed), generator)
        inputs = (len(seen) if encoder is None else features) + context
        self.conditioner = Conditioner(inputs, hidden, start, generator)

    def _conditioned(self, value: Tensor, context: Tensor | None) -> Tensor:
        features = value[:, self.seen]
        if self.encoder is not None:
            features = self.encoder(features)
        if context is not None:
            features = torch.cat([features, context], dim=-1)
        parameters: Tensor = self.conditioner(features)
        return parameters

    def _couple(self, value: Tensor, context: Tensor | None, latent_to_data: bool) -> Transformed:
        parameters = self._conditioned(value, context)
        direction = self.transform.forward if latent_to_data else self.transform.inverse
        new, log_slope = direction(value[:, self.transformed], parameters)
        if self.wrap:
            new = new - new.detach().floor()
        merged = torch.cat([new, value[:, self.others]], dim=-1)[:, self.restore]
        return Transformed(merged, log_slope.sum(-1))

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """See :meth:`Bijection.forward`."""
        return self._couple(value, context, latent_to_data=True)

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """See :meth:`Bijection.inverse`."""
        return self._couple(value, context, latent_to_data=False)
