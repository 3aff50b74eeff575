"""What an ``openmm.PythonForce`` calls at every force evaluation, and how it survives serialisation.

Facts of OpenMM 8.6.1 that shape this module:

- ``PythonForce`` keeps only ``str(exception)`` of what its function raises, so the message carries the
  traceback.
- An energy that is no number becomes -1 kJ/mol and NaN passes through, so results are checked here.
- The pickled function is loaded by C++ code that ends the process when ``pickle.loads`` raises, so
  :func:`load_computation` never raises: it returns an :class:`UnavailableComputation` instead.
- One System may serve several Contexts in several Python threads with one and the same function object, so
  buffers belong to a thread.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from ....core.compilation.compiled_potential import Program, direct_program
from ....core.compilation.loading import load_accelerated
from ....core.errors import ConfigurationError, FlowbridgeError, ModelFileError, NonFiniteEnergyError
from ....core.model_files import files as model_files
from ....core.potential import Potential

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_POSITIONS = openmm.State.Positions

LARGEST_FORCE = 2.0**31
"""kJ/mol/nm, where the 64-bit fixed-point numbers (units of 2**-32) of OpenMM's GPU platforms overflow."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How a computation evaluates its potential.

    Attributes:
        replicas: number of copies of the molecule, evaluated as one batch.
        scale_parameter: global parameter that multiplies energy and forces; None for no such parameter.
        dtype: name of the floating type of parameters and positions (``"float32"``, ``"float64"``); None
            keeps the parameters as they are and gives float64 positions.
        device: torch device on which the potential runs; None keeps it where it is.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    replicas: int = 1
    scale_parameter: str | None = None
    dtype: str | None = None
    device: str | None = None
    compilation: str = "auto"

    @property
    def positions_dtype(self) -> torch.dtype:
        """Floating type of the positions that the potential is given."""
        return torch.float64 if self.dtype is None else getattr(torch, self.dtype)

    def place(self, potential: Potential) -> Potential:
        """Move ``potential`` (in place) to the dtype and device asked for, and return it."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return potential.to(device=self.device, dtype=dtype)


class _Workspace(threading.local):
    """Buffers of one thread: what OpenMM writes to, seen by numpy and by torch."""

    def __init__(self, replicas: int, particles: int) -> None:
        self.positions = np.zeros((replicas * particles, 3))
        self.batch = torch.from_numpy(self.positions).view(replicas, particles, 3)
        self.results = np.zeros((replicas, particles, 3))
        self.result_rows = self.results.reshape(-1, 3)
        self.forces = np.zeros((replicas * particles, 3))
        self.last: tuple[tuple[object, ...], float, FloatArray] | None = None


class PotentialComputation:
    """A potential as the function of a ``PythonForce``: a State in, ``(energy, forces)`` out.

    Args:
        potential: the potential, already on its device and in its dtype; it is not changed.
        options: how to evaluate it.
        source: absolute path and digest of the model file the potential was loaded from. Without it the
            computation works but cannot be pickled.
        fixed: whether nothing changes the potential any more, so that results may be remembered.
    """

    def __init__(
        self,
        potential: Potential,
        options: EvaluationOptions,
        source: tuple[str, str] | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        self.potential = potential
        self.options = options
        self.source = source
        self._fixed = fixed
        self._defaults = dict(potential.metadata.global_parameters)
        self._workspace = _Workspace(options.replicas, len(potential.metadata.particles))
        tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        self._dtype = options.positions_dtype
        self._elsewhere = self._device.type != "cpu" or self._dtype != torch.float64
        self._periodic = potential.metadata.periodic
        self._program = direct_program(potential, options.replicas, self._dtype)
        inputs = self._elsewhere or self._periodic or self._defaults or options.scale_parameter is not None
        self._direct = self._program if options.replicas == 1 and not inputs else None

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str, str]]:
        """Pickle as loader, path, digest and options: small, and the same bytes for the same model."""
        if self.source is None:
            raise ConfigurationError(UNSAVED)
        return load_computation, (*self.source, json.dumps(asdict(self.options), sort_keys=True))

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Return energy (kJ/mol, summed over replicas) and forces (``(replicas * N, 3)``, kJ/mol/nm).

        Raises:
            FlowbridgeError: whatever went wrong, with step, time and the original traceback in its message
                (NonFiniteEnergyError for NaN and infinities).
        """
        try:
            return self._evaluate(state) if self._direct is None else self._evaluate_directly(state, self._direct)
        except Exception as error:
            kind = NonFiniteEnergyError if isinstance(error, NonFiniteEnergyError) else FlowbridgeError
            cause = str(error) if isinstance(error, FlowbridgeError) else f"{type(error).__name__}: {error}"
            report = f"flowbridge stopped the run {_moment(state)}: {cause}\n\n{traceback.format_exc()}"
            raise kind(report) from error

    def _evaluate_directly(self, state: openmm.State, program: Program) -> tuple[float, FloatArray]:
        """One molecule, compiled: the program takes as long as a few dozen lines of Python, so none are wasted."""
        workspace = self._workspace
        _read_positions(state, workspace.positions)
        energies, rows = program([workspace.batch])
        energy, forces = energies.item(), rows.numpy()[0]  # copied by OpenMM before the next call overwrites them
        if not (math.isfinite(energy) and np.vdot(forces, forces) < LARGEST_FORCE**2):
            self._check(energy, forces)
        return energy, forces

    def _evaluate(self, state: openmm.State) -> tuple[float, FloatArray]:
        workspace = self._workspace
        _read_positions(state, workspace.positions)
        cell = self._cell(state) if self._periodic else None
        parameters: dict[str, float] = {}
        scale = 1.0
        if self._defaults or self.options.scale_parameter is not None:
            values = state.getParameters()
            parameters = {name: values[name] for name in self._defaults}
            if self.options.scale_parameter is not None:
                scale = values[self.options.scale_parameter]
        energy, forces = self._remembered(workspace, cell, parameters)
        if scale != 1.0:
            return energy * scale, np.multiply(forces, scale, out=workspace.forces)
        return energy, forces

    def _remembered(
        self, workspace: _Workspace, cell: torch.Tensor | None, parameters: dict[str, float]
    ) -> tuple[float, FloatArray]:
        """Evaluate, unless the last evaluation of this thread was at the same point.

        OpenMM asks once for the energy that a reporter wants and again, at the same positions, for the forces of the
        next step. Only a model that nothing but its file defines is remembered: an object may be trained in between.
        """
        if not self._fixed:
            return self._computed(workspace, cell, parameters)
        box = None if cell is None else cell[0].numpy(force=True).tobytes()
        key = (workspace.positions.tobytes(), box, tuple(parameters.items()))
        if workspace.last is None or workspace.last[0] != key:
            workspace.last = None  # its forces may lie where the next ones are written to
            workspace.last = (key, *self._computed(workspace, cell, parameters))
        return workspace.last[1:]

    def _computed(
        self, workspace: _Workspace, cell: torch.Tensor | None, parameters: dict[str, float]
    ) -> tuple[float, FloatArray]:
        if self._program is not None:
            energy, forces = self._by_program(self._program, workspace, cell, parameters)
        else:
            energy, forces = self._by_potential(workspace.batch, cell, parameters)
        # A single dot product sees every NaN, infinity and overflow; which one it was is found out only then.
        if not (math.isfinite(energy) and np.vdot(forces, forces) < LARGEST_FORCE**2):
            self._check(energy, forces)
        return energy, forces

    def _by_program(
        self,
        program: Program,
        workspace: _Workspace,
        cell: torch.Tensor | None,
        parameters: dict[str, float],
    ) -> tuple[float, FloatArray]:
        """Call compiled code with the buffers of this thread: next to nothing besides the call."""
        inputs = [workspace.batch if self._dtype == torch.float64 else workspace.batch.to(self._dtype)]
        if cell is not None:
            inputs.append(cell.contiguous())
        inputs += [torch.tensor(value, dtype=torch.float64) for value in parameters.values()]
        energies, forces = program(inputs)
        np.copyto(workspace.results, forces.numpy())
        return (energies if self.options.replicas == 1 else energies.sum()).item(), workspace.result_rows

    def _by_potential(
        self, batch: torch.Tensor, cell: torch.Tensor | None, parameters: dict[str, float]
    ) -> tuple[float, FloatArray]:
        if self._elsewhere:
            batch = batch.to(device=self._device, dtype=self._dtype)
        result = self.potential.energy_and_forces(batch, cell, **parameters)
        if result.forces.shape != batch.shape or result.energy.shape != batch.shape[:1]:
            raise ConfigurationError(
                f"{type(self.potential).__name__} returned energies of shape {tuple(result.energy.shape)} "
                f"and forces of shape {tuple(result.forces.shape)} for positions of shape "
                f"{tuple(batch.shape)}"
            )
        energy = (result.energy if self.options.replicas == 1 else result.energy.sum()).item()
        output = result.forces.detach()
        if output.dtype != torch.float64 or self._elsewhere:
            output = output.to(device="cpu", dtype=torch.float64)
        return energy, output.numpy().reshape(-1, 3)

    def _cell(self, state: openmm.State) -> torch.Tensor:
        """Return the box vectors as rows, ``(replicas, 3, 3)`` in nm."""
        box = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer)
        cell = torch.as_tensor(box, dtype=self._dtype, device=self._device)
        return cell.expand(self.options.replicas, 3, 3)

    def _check(self, energy: float, forces: FloatArray) -> None:
        """Raise NonFiniteEnergyError that names the cause, unless the forces are merely large but usable."""
        particles = self.potential.metadata.particles

        def culprits(bad: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
            found = np.flatnonzero(np.any(bad, axis=1))
            shown = [particles.label(int(i) % len(particles)) for i in found[:3]]
            return f"{len(found)} of {len(bad)} particles, first {', '.join(shown)}"

        lost = ~np.isfinite(self._workspace.positions)
        if lost.any():
            raise NonFiniteEnergyError(
                f"the positions of {culprits(lost)} are NaN or infinite: the integration blew up before this "
                "evaluation; start from a relaxed structure or use a smaller time step"
            )
        if not math.isfinite(energy):
            raise NonFiniteEnergyError(
                f"{type(self.potential).__name__} gives an energy of {energy} kJ/mol at finite positions: "
                "the structure has left the region where the potential is defined"
            )
        infinite = ~np.isfinite(forces)
        if infinite.any():
            raise NonFiniteEnergyError(
                f"{type(self.potential).__name__} gives NaN or infinite forces on {culprits(infinite)}"
            )
        too_large = np.abs(forces) >= LARGEST_FORCE
        if too_large.any():
            raise NonFiniteEnergyError(
                f"the forces on {culprits(too_large)} exceed {LARGEST_FORCE:.1e} kJ/mol/nm, which overflows "
                "on OpenMM's GPU platforms; start from a structure nearer to those the potential was "
                "trained on"
            )


class UnavailableComputation:
    """Stands for a computation whose model file could not be used; says why as soon as it is evaluated."""

    def __init__(self, path: str, digest: str, options: str, reason: str) -> None:
        self.arguments = (path, digest, options)
        self.reason = reason

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str, str]]:
        """Pickle as the computation it stands for, so that putting the file back is enough."""
        return load_computation, self.arguments

    def __call__(self, state: openmm.State) -> tuple[float, FloatArray]:
        """Raise ModelFileError with the reason."""
        raise ModelFileError(self.reason)


UNSAVED = (
    "this potential is in no model file, or has changed since, so OpenMM can run it but not serialise it: "
    "the System cannot be written as XML, copied with copy.deepcopy, or use the force inside a "
    "CustomCVForce (OpenMM then says that its function could not be pickled). Save it first with "
    "flowbridge.save(potential, path), then add it"
)

_loaded: weakref.WeakValueDictionary[tuple[str, str, EvaluationOptions], Potential] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def computation_from_file(
    path: str | Path, options: EvaluationOptions, digest: str | None = None
) -> PotentialComputation:
    """Return the computation of a model file; a file in use with the same options is loaded once a process.

    Args:
        path: the model file.
        options: how to evaluate it.
        digest: what the file's digest must be; None accepts the one it has.

    Raises:
        ModelFileError: when the file is missing, damaged, or has another digest.
    """
    location = str(Path(path).absolute())
    found = model_files.read_header(location).digest
    if digest is not None and found != digest:
        raise ModelFileError(
            f"{location} has changed since the force was made: its digest is {found}, the force was made "
            f"with {digest}. Put the former file back, or call add_potential again on a System without this "
            "force"
        )
    key = (location, found, options)
    with _loading:
        potential = _loaded.get(key)
        if potential is None:
            potential = load_accelerated(
                location,
                digest=found,
                batch=options.replicas,
                dtype=options.dtype,
                device=options.device,
                mode=options.compilation,
            )
            _loaded[key] = potential
    return PotentialComputation(potential, options, (location, found), fixed=True)


def load_computation(path: str, digest: str, options: str) -> PotentialComputation | UnavailableComputation:
    """Rebuild a computation from its pickle, when OpenMM deserialises or copies a System.

    Never raises, because OpenMM 8.6.1 ends the process when unpickling fails: a file that cannot be used
    gives a warning now and an error with the same text at the first evaluation.

    Args:
        path: absolute path of the model file.
        digest: digest that the file must have.
        options: :class:`EvaluationOptions` as JSON.
    """
    try:
        return computation_from_file(path, EvaluationOptions(**json.loads(options)), digest)
    except Exception as error:
        reason = f"the model file of a flowbridge force cannot be used: {error}"
        # A warning turned into an exception by a filter would end the process as well.
        with contextlib.suppress(Warning):
            warnings.warn(reason, stacklevel=2)
        return UnavailableComputation(path, digest, options, reason)


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
