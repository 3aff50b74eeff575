"""Features of rigid bodies and a transformer over them, independent of the signs of quaternions by construction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..crystal import CrystalCoordinates

_REACH = 0.1
"""Size of a parameter for an output of one. Fluctuations in a crystal are a tenth of an angle, and an optimiser's step of the
outputs should not be larger than they are."""


class BodyFeatures(nn.Module):
    """Features of displacements and orientations, of order one for the fluctuations that they are fitted to.

    An orientation enters by the products of its quaternion's components, which are the same for q and -q and contain
    the matrix of the rotation; a displacement, where there is a box, by sine and cosine of its angle on the torus.

    Args:
        box: ``(3,)`` nm or None.
        displacement: typical displacement in nm.
        rotation: typical vector part of a relative quaternion (half an angle).
    """

    box: Tensor | None

    def __init__(self, box: Tensor | None, displacement: float, rotation: float) -> None:
        super().__init__()
        self.register_buffer(
            "box", None if box is None else torch.as_tensor(box, dtype=torch.float64), persistent=False
        )
        self.displacement, self.rotation = displacement, rotation
        self.count = (0 if box is None else 6) + 9

    def forward(self, value: CrystalCoordinates, shown: Tensor) -> Tensor:
        """Return ``(B, M, count)``.

        Args:
            value: coordinates.
            shown: ``(M, 2)``, one where the displacement and the orientation of a body may be seen, zero elsewhere.
        """
        parts = []
        if self.box is not None:
            angles = 2.0 * math.pi * value.displacements / self.box
            typical = 2.0 * math.pi * self.displacement / self.box
            places = torch.cat([angles.sin() / typical, (1.0 - angles.cos()) / typical.square()], dim=-1)
            parts.append(places * shown[:, :1])
        scalar, vector = value.orientations[..., :1], value.orientations[..., 1:] / self.rotation
        x, y, z = vector.unbind(-1)
        pairs = torch.stack([x * x, y * y, z * z, x * y, y * z, z * x], dim=-1)
        parts.append(torch.cat([scalar * vector, pairs], dim=-1) * shown[:, 1:])
        return torch.cat(parts, dim=-1)


class _AttentionBlock(nn.Module):
    """Attention between bodies, then a network for each."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mixing = nn.Linear(channels, 3 * channels)
        self.joining = nn.Linear(channels, channels)
        self.network = nn.Sequential(nn.Linear(channels, 2 * channels), nn.SiLU(), nn.Linear(2 * channels, channels))

    def forward(self, value: Tensor) -> Tensor:
        """Map ``(B, M, C)`` to ``(B, M, C)``."""
        mixed = self.mixing(self.first(value)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        seen = functional.scaled_dot_product_attention(*mixed.unbind(2))
        value = value + self.joining(seen.transpose(1, 2).flatten(2))
        return value + self.network(self.second(value))


class BodyTransformer(nn.Module):
    """A transformer over labelled bodies: features of each, and who it is, to parameters of each.

    Args:
        count: number of bodies M.
        features: number of features of a body.
        outputs: number of parameters of a body; zero before training.
        channels: width.
        heads: attention heads; a divisor of ``channels``.
        blocks: number of attention blocks.
        generator: source of random numbers for initial weights.
    """

    def __init__(
        self,
        count: int,
        features: int,
        outputs: int,
        channels: int,
        heads: int,
        blocks: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, channels)
        self.identity = nn.Parameter(torch.zeros(count, channels))  # the product of one-hot identities with a matrix
        self.blocks = nn.ModuleList(_AttentionBlock(channels, heads) for _ in range(blocks))
        self.last = nn.LayerNorm(channels)
        self.output = nn.Linear(channels, outputs)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    bound = 1.0 / math.sqrt(module.in_features)
                    module.weight.uniform_(-bound, bound, generator=generator)
                    module.bias.zero_()
            self.identity.normal_(generator=generator)
            self.output.weight.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, M, features)`` to ``(B, M, outputs)``, in the network's precision."""
        value = self.embedding(features.to(self.identity.dtype)) + self.identity
        for block in self.blocks:
            value = block(value)
        result: Tensor = _REACH * self.output(self.last(value))
        return result


class ConstantParameters(nn.Module):
    """Parameters that do not depend on the configuration, for conditioners without any input.

    Args:
        count: number of bodies M.
        outputs: number of parameters of a body; zero before training.
    """

    def __init__(self, count: int, outputs: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count, outputs, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(1, M, outputs)``, which goes with every configuration, for features ``(B, M, ...)``."""
        return self.values.unsqueeze(0)
