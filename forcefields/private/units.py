"""Units of privacy: samples grouped into frames, trajectories or molecules that are drawn and clipped as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .noise import NoiseSource


class UnitBatch(NamedTuple):
    """Samples of the units drawn in one step: tensors ``(S, ...)``, and which of the ``units`` units ``(S,)`` owns each."""

    inputs: Tensor
    targets: Tensor
    owners: Tensor
    units: int


@dataclass(frozen=True)
class UnitData:
    """Samples with the unit that each belongs to.

    Attributes:
        inputs: ``(S, ...)``.
        targets: ``(S, ...)``: values, class numbers, forces.
        owners: ``(S,)``, a number for each sample that samples of the same unit share; None makes every sample a unit.
        unit: name of a unit, for the ledger: ``frame``, ``trajectory``, ``molecule``, ``patient`` ...
        per_step: samples that a drawn unit contributes in a step, chosen each time without replacement; None for all.
            Which ones is the unit's own affair: its contribution is clipped as before, and no privacy is claimed for it.
    """

    inputs: Tensor
    targets: Tensor
    owners: Tensor | None = None
    unit: str = "frame"
    per_step: int | None = None
    _order: Tensor = field(init=False, repr=False)
    _starts: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        samples = len(self.inputs)
        if len(self.targets) != samples:
            raise ConfigurationError(f"{samples} inputs and {len(self.targets)} targets do not belong together")
        if self.owners is not None and self.owners.shape != (samples,):
            raise ConfigurationError(
                f"owners must hold one unit number for each of the {samples} samples, got shape {tuple(self.owners.shape)}"
            )
        if not samples:
            raise ConfigurationError("there are no samples")
        if self.per_step is not None and self.per_step < 1:
            raise ConfigurationError(f"per_step must be at least 1, got {self.per_step}")
        if not self.unit.strip():
            raise ConfigurationError("name the unit of privacy: frame, trajectory, molecule ...")
        for label, values in (("inputs", self.inputs), ("targets", self.targets)):
            broken = (~torch.isfinite(values)).sum()
            if broken:
                raise ConfigurationError(
                    f"{int(broken)} numbers of the {label} are NaN or infinite: clean the data first"
                )
        owners = torch.arange(samples) if self.owners is None else self.owners
        _, numbers = torch.unique(owners, return_inverse=True)
        sizes = torch.bincount(numbers)
        object.__setattr__(self, "_order", torch.argsort(numbers, stable=True))
        object.__setattr__(self, "_starts", torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]))

    @property
    def units(self) -> int:
        """Number of units, which counts as public."""
        return len(self._starts) - 1

    def batch(self, chosen: Tensor, noise: NoiseSource | None = None) -> UnitBatch:
        """Return the samples of units ``(U,)``; with ``noise``, no more than ``per_step`` of each."""
        begins, ends = self._starts[chosen], self._starts[chosen + 1]
        sizes = ends - begins
        owners = torch.repeat_interleave(torch.arange(len(chosen)), sizes)
        within = torch.arange(int(sizes.sum())) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        rows = self._order[begins[owners] + within]
        if noise is not None and self.per_step is not None and len(rows):
            # A random order inside each unit: sort by (unit, random key), keep the first ones.
            order = torch.argsort(owners + noise.uniform(len(rows)))
            kept = order[within < self.per_step]
            rows, owners = rows[kept], owners[kept]
        return UnitBatch(self.inputs[rows], self.targets[rows], owners, len(chosen))


def draw_units(units: int, rate: float, noise: NoiseSource) -> Tensor:
    """Return the numbers of the units drawn, each independently with probability ``rate``: as accountants assume.

    The number drawn varies, and may be zero. Shuffled batches of one size are another mechanism, with another price.
    """
    if rate == 1.0:
        return torch.arange(units)
    return torch.nonzero(noise.uniform(units) < rate)[:, 0]


def mean_by_unit(values: Tensor, batch: UnitBatch) -> Tensor:
    """Return means ``(U, ...)`` over the samples ``(S, ...)`` of each unit."""
    total = values.new_zeros(batch.units, *values.shape[1:]).index_add_(0, batch.owners, values)
    sizes = torch.bincount(batch.owners, minlength=batch.units).clamp_min(1).to(values.dtype)
    return total / sizes.reshape(-1, *(1,) * (values.dim() - 1))
