"""Coupling layers: the other coordinates and a context determine how some coordinates are transformed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bijection import Bijection, ElementwiseTransform, Transformed, Triangular
from .conditioners import Conditioner
from .permutations import Permutation


class Coupling(Bijection):
    """Transform the coordinates ``transformed`` with parameters that the remaining ones and a context determine.

    Each direction is closed form if the transform's is.

    Args:
        dimension: number of coordinates D.
        transformed: indices of the coordinates to transform.
        transform: family of elementwise maps.
        hidden: widths of the conditioner's hidden layers.
        generator: source of random numbers for initial weights.
        conditioning: indices that the conditioner sees; all others where None.
        encoder: module that turns the seen coordinates into features (Fourier features of angles); None: as they are.
        features: number of features that ``encoder`` gives; ignored without one.
        context: number of context features.
        wrap: whether transformed coordinates are angles in turns, to be wrapped to [0, 1).
    """

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
        seen = [i for i in range(dimension) if i not in set(transformed)] if conditioning is None else conditioning
        rest = [i for i in range(dimension) if i not in {*transformed, *seen}]
        self.order = Permutation([*transformed, *seen, *rest])
        self.sizes = (len(transformed), len(seen))
        self.transform = transform
        self.encoder = encoder
        self.wrap = wrap
        start = transform.initial_parameters(len(transformed), generator)
        inputs = (len(seen) if encoder is None else features) + context
        self.conditioner = Conditioner(inputs, hidden, start, generator, parameters_apart=transform.parameters_apart)

    def _conditioned(self, seen: Tensor, context: Tensor | None) -> Tensor:
        features = seen if self.encoder is None else self.encoder(seen)
        if context is not None:
            features = torch.cat([features, context], dim=-1)
        parameters: Tensor = self.conditioner(features)
        return parameters

    def _couple(self, value: Tensor, context: Tensor | None, latent_to_data: bool) -> tuple[Tensor, Tensor]:
        """Return all coordinates, and the logarithms of the derivatives of the transformed ones."""
        ordered = self.order(value)
        count, seen = self.sizes
        parameters = self._conditioned(ordered[:, count : count + seen], context)
        direction = self.transform.forward if latent_to_data else self.transform.inverse
        new, log_slope = direction(ordered[:, :count], parameters)
        if self.wrap:
            new = new - new.detach().floor()
        return self.order.inverse(torch.cat([new, ordered[:, count:]], dim=-1)), log_slope

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        mapped, log_slope = self._couple(value, context, latent_to_data=True)
        return Transformed(mapped, log_slope.sum(-1))

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        mapped, log_slope = self._couple(value, context, latent_to_data=False)
        return Transformed(mapped, log_slope.sum(-1))

    def layer_inverse(self, value: Tensor, context: Tensor | None = None) -> Triangular:
        mapped, log_slope = self._couple(value, context, latent_to_data=False)
        count = self.sizes[0]
        unchanged = value.shape[1] - count
        ones = value.new_ones(len(value), unchanged)
        slopes = self.order.inverse(torch.cat([log_slope.detach().exp(), ones], dim=-1))
        changed = self.order.inverse(torch.cat([value.new_ones(count), value.new_zeros(unchanged)]))
        return Triangular(mapped, log_slope.sum(-1), slopes, changed)
