"""Batched energies of configurations: what a Boltzmann generator is trained against and reweighted to."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from .errors import ConfigurationError
from .evaluator import EvaluationOptions, Evaluator
from .potential import Potential

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

COMPILED_BATCH = 64
"""Configurations of one call of a compiled program in a batch: enough to fill vectors, few enough to share between cores."""


@runtime_checkable
class BatchedEnergy(Protocol):
    """Something that evaluates many configurations of one system."""

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` in kJ/mol and forces ``(B, N, 3)`` in kJ/mol/nm.

        Args:
            positions: ``(B, N, 3)`` in nm.

        A configuration whose energy cannot be evaluated gives NaN, never a number of another configuration.
        """
        ...


class PotentialEnergy:
    """A :class:`~flowbridge.core.potential.Potential` as a :class:`BatchedEnergy`."""

    def __init__(self, potential: Potential, chunk: int = 4096) -> None:
        self.potential = potential
        self.chunk = chunk

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See :meth:`BatchedEnergy.energies_and_forces`."""
        parts = [
            self.potential.energy_and_forces(part)
            for part in torch.as_tensor(np.ascontiguousarray(positions)).split(self.chunk)
        ]
        energies = torch.cat([part.energy for part in parts])
        forces = torch.cat([part.forces for part in parts])
        return energies.double().cpu().numpy(), forces.double().cpu().numpy()


def as_batched_energy(target: Any) -> BatchedEnergy:
    """Return ``target`` as a :class:`BatchedEnergy`.

    Accepts a BatchedEnergy, a Potential, the path of a model file (compiled once for this machine, as for an engine: see
    :mod:`flowbridge.core.compilation.building`), or an object of an engine for which an adapter is registered in the entry
    point group ``flowbridge.energy_sources`` under the engine's top-level module name (``openmm``: a ``System``).
    """
    if isinstance(target, (str, Path)):
        return PotentialEnergy(Evaluator.of(target, EvaluationOptions(replicas=COMPILED_BATCH)).evaluated)
    if isinstance(target, Potential):
        return PotentialEnergy(target)
    if isinstance(target, BatchedEnergy):
        return target
    engine = type(target).__module__.partition(".")[0]
    for entry in entry_points(group="flowbridge.energy_sources", name=engine):
        source: BatchedEnergy = entry.load()(target)
        return source
    raise ConfigurationError(
        f"cannot evaluate energies of a {type(target).__module__}.{type(target).__qualname__}: give an openmm.System, "
        "a flowbridge Potential, the path of a model file, or an object with energies_and_forces(positions)"
    )
