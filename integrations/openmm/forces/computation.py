"""What an ``openmm.PythonForce`` calls at every force evaluation.

Facts of OpenMM 8.6.1 that shape this module:

- ``PythonForce`` keeps only ``str(exception)`` of what its function raises, so the message carries the
  traceback.
- An energy that is no number becomes -1 kJ/mol and NaN passes through, so results are checked.
- The pickled function is loaded by C++ code that ends the process when ``pickle.loads`` raises, so
  :func:`~flowbridge.integrations.openmm.computation.load_computation` never raises: it returns an
  :class:`UnavailableComputation` instead.
- One System may serve several Contexts in several Python threads with one and the same function object, so
  buffers belong to a thread.
"""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import openmm
from openmm import unit

from ....core.errors import ConfigurationError, FlowbridgeError, ModelFileError, NonFiniteEnergyError
from ....core.evaluator import Evaluator

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_POSITIONS = openmm.State.Positions

UNSAVED = (
    "this potential is in no model file, or has changed since, so OpenMM can run it but not serialise it: "
    "the System cannot be written as XML, copied with copy.deepcopy, or use the force inside a "
    "CustomCVForce (OpenMM then says that its function could not be pickled). Save it first with "
    "flowbridge.save(potential, path), then add it"
)


class OpenMMEvaluator(Evaluator):
    """A potential that OpenMM evaluates; its GPU platforms keep forces as 64-bit fixed-point numbers in units of 2**-32."""

    largest_force = 2.0**31
    force_limit = "overflows on OpenMM's GPU platforms"


class _Memory(threading.local):
    """The last evaluation of one thread: where, and what came of it."""

    point: tuple[object, ...] | None = None
    energy: float
    forces: FloatArray


class PotentialComputation:
    """A potential as the function of a ``PythonForce``: a State in, ``(energy, forces)`` out.

    Args:
        evaluator: of the potential. Without the source of its potential the computation works but cannot be pickled.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._buffers, self._memory = evaluator.buffers, _Memory()
        self._scale = evaluator.options.scale_parameter
        self._names = tuple(evaluator.metadata.global_parameters)
        self._periodic = evaluator.metadata.periodic
        self._inputs = bool(evaluator.global_parameters)
        self._direct = evaluator.direct and not self._inputs

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str, str]]:
        """Pickle as loader, path, digest and options: small, and the same bytes for the same model."""
        from ..computation import load_computation

        if self.evaluator.source is None:
            raise ConfigurationError(UNSAVED)
        path, digest = self.evaluator.source
        return load_computation, (str(path), digest, json.dumps(asdict(self.evaluator.options), sort_keys=True))

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Return energy (kJ/mol, summed over replicas) and forces (``(replicas * N, 3)``, kJ/mol/nm).

        Raises:
            FlowbridgeError: whatever went wrong, with step, time and the original traceback in its message
                (NonFiniteEnergyError for NaN and infinities).
        """
        try:
            _read_positions(state, self._buffers.positions)
            # OpenMM copies the forces before the next call overwrites them.
            return self.evaluator.evaluate() if self._direct else self._evaluated(state)
        except Exception as error:
            kind = NonFiniteEnergyError if isinstance(error, NonFiniteEnergyError) else FlowbridgeError
            cause = str(error) if isinstance(error, FlowbridgeError) else f"{type(error).__name__}: {error}"
            report = f"flowbridge stopped the run {_moment(state)}: {cause}\n\n{traceback.format_exc()}"
            raise kind(report) from error

    def _evaluated(self, state: openmm.State) -> tuple[float, FloatArray]:
        cell = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer) if self._periodic else None
        values = state.getParameters() if self._inputs else {}
        energy, forces = self._remembered(cell, {name: values[name] for name in self._names})
        scale = 1.0 if self._scale is None else values[self._scale]
        if scale != 1.0:
            return energy * scale, np.multiply(forces, scale, out=self._buffers.forces)
        return energy, forces

    def _remembered(self, cell: FloatArray | None, parameters: dict[str, float]) -> tuple[float, FloatArray]:
        """Evaluate, unless the last evaluation of this thread was at the same point.

        OpenMM asks once for the energy that a reporter wants and again, at the same positions, for the forces of the
        next step. Only a model that nothing but its file defines is remembered: an object may be trained in between.
        """
        if not self.evaluator.fixed:
            return self.evaluator.evaluate(cell, parameters)
        memory, box = self._memory, None if cell is None else cell.tobytes()
        point = (self._buffers.positions.tobytes(), box, tuple(parameters.values()))
        if memory.point != point:
            energy, forces = self.evaluator.evaluate(cell, parameters)
            memory.point, memory.energy, memory.forces = point, energy, forces.copy()
        return memory.energy, memory.forces


class UnavailableComputation:
    """Stands for a computation whose model file could not be used; says why as soon as it is evaluated."""

    def __init__(self, path: str, digest: str, options: str, reason: str) -> None:
        self.arguments = (path, digest, options)
        self.reason = reason

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str, str]]:
        """Pickle as the computation it stands for, so that putting the file back is enough."""
        from ..computation import load_computation

        return load_computation, self.arguments

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Raise ModelFileError with the reason."""
        raise ModelFileError(self.reason)


def _read_positions(state: openmm.State, output: FloatArray) -> None:
    """Copy the positions of ``state`` in nm to ``output``, a C-contiguous float64 array.

    The method behind ``getPositions(asNumpy=True)`` costs a tenth of it but copies without looking at the
    size.
    """
    try:
        given = state._getNumParticles()
        if given == len(output):
            state._getVectorAsNumpy(_POSITIONS, output)
            return
    except AttributeError:
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        given = len(positions)
        if positions.shape == output.shape:
            output[:] = positions
            return
    raise ConfigurationError(
        f"the force was made for {len(output)} particles but the System now has {given}: add the potential "
        "after all particles, or name its particles with particles="
    )


def _moment(state: openmm.State) -> str:
    steps, time = state.getStepCount(), state.getTime().value_in_unit(unit.picosecond)
    # Inside a CustomCVForce the State is that of an inner Context, which keeps the time but counts no steps.
    if steps == 0 and time > 0:
        return f"at time {time:.6g} ps (steps are not counted inside a CustomCVForce)"
    return f"at step {steps} (time {time:.6g} ps)"
