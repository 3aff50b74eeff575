"""DP-SGD: gradients of every unit's loss, clipped as one vector (Abadi et al., arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.errors import ConfigurationError
from ..units import UnitBatch
from .clipping import Contributions, clipped_sum
from .feed_forward import FeedForwardNetwork, task_losses

SampleLoss = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""Loss of one sample, a scalar, from parameters by name, its input and its target."""

_NUMBERS = 20_000_000  # in gradients held at a time


class SampleGradients:
    """Clipped sums of gradients of any module whose loss is a sum over samples.

    Args:
        module: trained module.
        loss: loss of one sample; evaluated under ``torch.func.vmap``, so without control flow that depends on values.

    Raises:
        ConfigurationError: naming the layers that mix samples (batch normalisation).
    """

    method: Literal["dp_mac", "dp_sgd"] = "dp_sgd"
    blocks: tuple[str, ...] = ("all parameters",)

    def __init__(self, module: nn.Module, loss: SampleLoss) -> None:
        refuse_mixing_layers(module)
        self.module = module
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ConfigurationError("the module has no parameters to train")
        self._gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    @classmethod
    def of_network(cls, network: FeedForwardNetwork) -> SampleGradients:
        """Return them for a feed-forward network and the loss of its task."""
        buffers = dict(network.named_buffers())
        task, outputs_of = network.settings.task, _Outputs(network)

        def loss(parameters: Mapping[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
            outputs = torch.func.functional_call(outputs_of, _inside(parameters, buffers), (inputs[None],))
            return task_losses(outputs, target[None], task)[0]

        return cls(network, loss)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        known = dict(self.module.named_parameters())
        return [known[name] for name in self._names]

    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        """Return the clipped sum of the gradients ``(P,)`` of the units' mean losses."""
        parameters = {name: p.detach() for name, p in zip(self._names, self.parameters, strict=True)}
        length = sum(p.numel() for p in parameters.values())
        dtype = next(iter(parameters.values())).dtype
        rows = torch.zeros(batch.units, length, dtype=dtype)
        sizes = torch.bincount(batch.owners, minlength=batch.units).clamp_min(1).to(dtype)
        for part in torch.arange(len(batch.owners)).split(max(_NUMBERS // length, 1)):
            if not len(part):  # nobody was drawn
                continue
            found = self._gradients(parameters, batch.inputs[part], batch.targets[part])
            flat = torch.cat([found[name].flatten(1) for name in self._names], dim=1)
            rows.index_add_(0, batch.owners[part], flat.detach())
        total, within, broken = clipped_sum(rows / sizes[:, None], thresholds[0])
        return Contributions([total], torch.tensor([within]), broken)

    def assign(self, means: list[Tensor], damping: float) -> None:
        """Put the noisy mean gradient into the parameters' ``grad``."""
        parts = means[0].split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)


def refuse_mixing_layers(module: nn.Module) -> None:
    """Raise ConfigurationError for layers whose result for one sample depends on others, now or in the past."""
    named = [
        f"{name or 'the module'} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        or (isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats)
    ]
    if named:
        raise ConfigurationError(
            f"layers that mix samples cannot be trained privately: {', '.join(named)}. The contribution of one unit could not "
            "be bounded: use GroupNorm or LayerNorm instead"
        )


class _Outputs(nn.Module):
    """A network's outputs as ``forward``, which the network itself has no use for."""

    def __init__(self, network: FeedForwardNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network.predict(inputs)


def _inside(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"network.{name}": value for name, value in {**parameters, **buffers}.items()}
