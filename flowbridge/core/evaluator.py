"""How every engine evaluates a potential: loaded once, placed, compiled where that works, checked, through raw buffers.

An engine's adapter translates its objects and units, and holds an :class:`Evaluator` for everything else.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from .compilation.building import accelerated
from .compilation.compiled_potential import CompiledPotential, direct_program
from .errors import ConfigurationError, NonFiniteEnergyError
from .model import ModelFile, what_is
from .model_files.files import matches_its_file, opened
from .potential import Potential

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class EvaluationOptions:
    """How a potential is evaluated.

    Attributes:
        replicas: number of copies of the molecule, evaluated as one batch.
        scale_parameter: global parameter that multiplies energy and forces; None for no such parameter.
        dtype: floating type to convert parameters and positions to (``"float32"``, ``"float64"``); None keeps the parameters
            and gives float64 positions. An object is copied before its parameters are converted.
        device: torch device on which the potential runs; None keeps an object where it is and puts a file's model on the CPU.
        compilation: ``"auto"`` compiles the model of a file to machine code once and keeps that in the user's cache
            (what ``$FLOWBRIDGE_COMPILE`` says where it is set); an object stays as it is. ``"always"`` compiles, or
            fails; an object is then frozen in its present state. ``"cached"`` uses what is in the cache,
            ``"never"`` evaluates with torch.

    Raises:
        ConfigurationError: for fewer than one replica or another dtype.
    """

    replicas: int = 1
    scale_parameter: str | None = None
    dtype: torch.dtype | str | None = None
    device: str | None = None
    compilation: str = "auto"

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigurationError(f"replicas must be at least 1, got {self.replicas}")
        name = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if name not in (None, "float32", "float64"):
            raise ConfigurationError(f"dtype must be float32, float64 or None, got {self.dtype!r}")
        object.__setattr__(self, "dtype", name)

    @property
    def positions_dtype(self) -> torch.dtype:
        """Floating type of the positions that the potential is given."""
        return torch.float64 if self.dtype is None else getattr(torch, str(self.dtype))

    @property
    def converts(self) -> bool:
        """Whether the potential is moved to another dtype or device."""
        return self.dtype is not None or self.device is not None

    def place(self, potential: Potential) -> Potential:
        """Move ``potential`` (in place) to the dtype and device asked for, and return it."""
        return potential.to(device=self.device, dtype=None if self.dtype is None else self.positions_dtype)


class Buffers(threading.local):
    """Arrays of one thread.

    An engine writes ``positions`` (``(replicas * N, 3)``, nm), torch sees them as ``batch``; ``forces`` is the
    engine's to scale the results in.
    """

    def __init__(self, replicas: int, particles: int) -> None:
        self.positions: FloatArray = np.zeros((replicas * particles, 3))
        self.batch = torch.from_numpy(self.positions).view(replicas, particles, 3)
        self.forces: FloatArray = np.zeros((replicas * particles, 3))


class Evaluator:
    """A potential that an engine evaluates: see :meth:`of`.

    Args:
        potential: the potential, already on its device and in its dtype; it is not changed.
        options: how to evaluate it.
        source: the model file that holds exactly this potential, None where there is none.
        compiled: what energies and forces are asked of instead, where there is a compiled form.
        fixed: whether nothing changes the potential any more, so that results may be remembered.

    Attributes:
        evaluated: what energies and forces are asked of.
        device: on which the potential runs.
    """

    noun: ClassVar[str] = "particles"
    energy_unit: ClassVar[str] = "kJ/mol"
    """What the engine's users call these, in messages."""

    largest_force: ClassVar[float] = math.inf
    force_limit: ClassVar[str] = "is too large"
    """kJ/mol/nm, and what is wrong with larger forces: an engine that cannot take them refuses them."""

    def __init__(
        self,
        potential: Potential,
        options: EvaluationOptions | None = None,
        source: ModelFile | None = None,
        *,
        compiled: Potential | None = None,
        fixed: bool = False,
    ) -> None:
        self.potential, self.source, self.fixed = potential, source, fixed
        self.options = options = options or EvaluationOptions()
        self.evaluated = compiled or potential
        self.metadata = potential.metadata
        scale = options.scale_parameter
        if scale in self.metadata.global_parameters:
            raise ConfigurationError(
                f"the potential has a global parameter {scale!r} of its own: choose another scale_parameter"
            )
        tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self._dtype = options.positions_dtype
        self._elsewhere = self.device.type != "cpu" or self._dtype != torch.float64
        self._program = direct_program(self.evaluated, options.replicas, self._dtype)
        plain = not (self._elsewhere or self.metadata.periodic or self.metadata.global_parameters)
        self._direct = self._program if plain and options.replicas == 1 else None

    @classmethod
    def of(
        cls,
        potential: Potential | str | os.PathLike[str],
        options: EvaluationOptions | None = None,
        *,
        digest: str | None = None,
    ) -> Self:
        """Return the evaluator of a potential or of a model file.

        A file is read once for it. Its model is built and compiled once a process: all that evaluate the file with the same
        options share it while one of them lives. An object is used as it is, or copied where it has to be converted or frozen.

        Args:
            potential: a potential, or the path of a model file.
            options: how to evaluate it.
            digest: what the file's digest must be; None accepts the one it has.

        Raises:
            ConfigurationError: for anything else than a potential or a path, or options that cannot be used.
            CompilationError: when ``compilation`` is ``"always"`` and the potential cannot be compiled.
            ModelFileError: when the model file cannot be read, or has another digest.

        Warns:
            UserWarning: with the reason where ``"auto"`` has to do without compiled code.
        """
        options = options or EvaluationOptions()
        if isinstance(potential, str | os.PathLike):
            return cls._of_file(potential, options, digest)
        if not isinstance(potential, Potential):
            raise ConfigurationError(
                f"potential must be a flowbridge Potential or the path of a model file, not {what_is(potential)}"
            )
        source = potential.model_file if matches_its_file(potential) else None
        if options.converts:
            potential = options.place(copy.deepcopy(potential))
        mode = "never" if options.compilation == "auto" else options.compilation
        if mode != "never":
            potential = copy.deepcopy(potential).requires_grad_(False)
        compiled = accelerated(potential, mode=mode, batch=options.replicas, dtype=options.positions_dtype)
        return cls(potential, options, source, compiled=compiled)

    @classmethod
    def _of_file(cls, path: str | os.PathLike[str], options: EvaluationOptions, digest: str | None) -> Self:
        source, build = opened(path, digest=digest)
        key = (source, replace(options, scale_parameter=None))
        with _loading:
            compiled = _loaded.get(key)
            if compiled is None:
                compiled = _loaded[key] = accelerated(
                    options.place(Potential.expected_in(path, build()).requires_grad_(False)),
                    mode=options.compilation,
                    digest=source.digest,
                    batch=options.replicas,
                    dtype=options.positions_dtype,
                )
        potential = compiled.potential if isinstance(compiled, CompiledPotential) else compiled
        return cls(potential, options, source, compiled=compiled, fixed=True)

    @cached_property
    def buffers(self) -> Buffers:
        """The arrays of the present thread."""
        return Buffers(self.options.replicas, len(self.metadata.particles))

    @property
    def direct(self) -> bool:
        """Whether :meth:`evaluate` is one call of compiled code: not worth remembering."""
        return self._direct is not None

    @property
    def global_parameters(self) -> dict[str, float]:
        """Names and defaults of all that an engine's users may set, the scale included."""
        scale = self.options.scale_parameter
        return {**self.metadata.global_parameters, **({} if scale is None else {scale: 1.0})}

    def parameters(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return the values of the potential's global parameters: those given, and the defaults of the others.

        Raises:
            ConfigurationError: for a name the potential does not have or a value that is not finite.
        """
        known = self.metadata.global_parameters
        for name, value in given.items():
            if name not in known:
                raise ConfigurationError(
                    f"the potential has no global parameter {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
            if not math.isfinite(value):
                raise ConfigurationError(f"global parameter {name} must be a finite number, got {value!r}")
        return {**known, **{name: float(value) for name, value in given.items()}}

    def evaluate(
        self, cell: FloatArray | None = None, parameters: Mapping[str, float] | None = None
    ) -> tuple[float, FloatArray]:
        """Evaluate the positions in :attr:`buffers`.

        Args:
            cell: ``(3, 3)``, row vectors in nm, of a periodic potential.
            parameters: values of all its global parameters, in the order of the metadata; the defaults where None.

        Returns:
            The energy (kJ/mol, summed over replicas) and the forces (``(replicas * N, 3)``, kJ/mol/nm), in memory that the
            next call in this thread may write to.

        Raises:
            NonFiniteEnergyError: for NaN or infinite positions, energies or forces, or forces too large for the engine.
            ConfigurationError: when the potential returns another shape than it was given.
        """
        buffers = self.buffers
        if self._direct is not None:
            # One molecule, compiled: the program takes as long as a few dozen lines of Python, so none are wasted.
            energies, rows = self._direct([buffers.batch])
            energy, forces = energies.item(), rows.numpy()[0]
        else:
            values = self.metadata.global_parameters if parameters is None else parameters
            energy, forces = self._computed(buffers, self._cell(cell), values)
        # A single dot product sees every NaN, infinity and overflow; which one it was is found out only then.
        if not (math.isfinite(energy) and np.vdot(forces, forces) < self.largest_force**2):
            self._refuse(energy, forces)
        return energy, forces

    def stress(self, cell: FloatArray, parameters: Mapping[str, float]) -> FloatArray:
        """Return the stress ``(3, 3)``, kJ/mol/nm^3, of a periodic potential's only replica in :attr:`buffers`."""
        return self.stresses(self._placed(self.buffers.batch), self._cell(cell), parameters)[0].cpu().double().numpy()

    def stresses(self, positions: Tensor, cell: Tensor | None, parameters: Mapping[str, float]) -> Tensor:
        """Return stresses ``(1/V) dE/d(strain)``, ``(B, 3, 3)`` in kJ/mol/nm^3, of a periodic potential.

        Args:
            positions: ``(B, N, 3)`` in nm.
            cell: ``(B, 3, 3)``, row vectors in nm.
            parameters: values of all global parameters.

        Raises:
            NonFiniteEnergyError: for a stress that is NaN or infinite.
        """
        if cell is None:
            raise ConfigurationError("stress needs a periodic potential")
        with torch.enable_grad():
            strain = torch.zeros_like(cell).requires_grad_(True)
            deformation = torch.eye(3, dtype=cell.dtype, device=cell.device) + (strain + strain.mT) / 2
            energy = self.potential(positions @ deformation, cell @ deformation, **parameters)
            (gradient,) = torch.autograd.grad(energy.sum(), strain)
        stress = gradient.detach() / torch.linalg.det(cell).abs()[:, None, None]
        if not bool(torch.isfinite(stress).all()):
            raise NonFiniteEnergyError(f"{type(self.potential).__name__} gives a stress that is NaN or infinite")
        return stress

    def _computed(
        self, buffers: Buffers, cell: Tensor | None, parameters: Mapping[str, float]
    ) -> tuple[float, FloatArray]:
        batch = self._placed(buffers.batch)
        if self._program is not None:
            # Next to nothing besides the call.
            values = [torch.tensor(value, dtype=torch.float64) for value in parameters.values()]
            energies, rows = self._program([batch, *(() if cell is None else (cell.contiguous(),)), *values])
            return (energies if self.options.replicas == 1 else energies.sum()).item(), rows.numpy().reshape(-1, 3)
        result = self.evaluated.energy_and_forces(batch, cell, **parameters)
        if result.forces.shape != batch.shape or result.energy.shape != batch.shape[:1]:
            raise ConfigurationError(
                f"{type(self.potential).__name__} returned energies of shape {tuple(result.energy.shape)} "
                f"and forces of shape {tuple(result.forces.shape)} for positions of shape "
                f"{tuple(batch.shape)}"
            )
        energy = (result.energy if self.options.replicas == 1 else result.energy.sum()).item()
        return energy, result.forces.detach().to(device="cpu", dtype=torch.float64).numpy().reshape(-1, 3)

    def _placed(self, batch: Tensor) -> Tensor:
        return batch.to(device=self.device, dtype=self._dtype) if self._elsewhere else batch

    def _cell(self, cell: FloatArray | None) -> Tensor | None:
        if cell is None:
            return None
        return torch.as_tensor(cell, dtype=self._dtype, device=self.device).expand(self.options.replicas, 3, 3)

    def _refuse(self, energy: float, forces: FloatArray) -> None:
        """Raise NonFiniteEnergyError that names the cause, unless the forces are merely large but usable."""
        name, positions = type(self.potential).__name__, self.buffers.positions
        if not np.isfinite(positions).all():
            raise NonFiniteEnergyError(
                f"the positions of {self._culprits(~np.isfinite(positions))} are NaN or infinite: the integration blew up "
                "before this evaluation; start from a relaxed structure or use a smaller time step"
            )
        if not math.isfinite(energy):
            raise NonFiniteEnergyError(
                f"{name} gives an energy of {energy} {self.energy_unit} at finite positions: the structure has left the "
                f"region where the potential is defined{self._strain(forces)}"
            )
        if not np.isfinite(forces).all():
            raise NonFiniteEnergyError(
                f"{name} gives NaN or infinite forces on {self._culprits(~np.isfinite(forces))}{self._strain(forces)}"
            )
        too_large = np.abs(forces) >= self.largest_force
        if too_large.any():
            raise NonFiniteEnergyError(
                f"the forces on {self._culprits(too_large)} exceed {self.largest_force:.1e} kJ/mol/nm, which "
                f"{self.force_limit}; start from a structure nearer to those the potential was trained on{self._strain(forces)}"
            )

    def _culprits(self, bad: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
        particles = self.metadata.particles
        found = np.flatnonzero(np.any(bad, axis=1))
        shown = ", ".join(particles.label(int(i) % len(particles)) for i in found[:3])
        return f"{len(found)} of {len(bad)} {self.noun}, first {shown}"

    def _strain(self, forces: FloatArray) -> str:
        """Return what is worst about the positions, as the end of a sentence, where that is known."""
        sizes = np.nan_to_num(np.linalg.norm(forces, axis=1), nan=math.inf)
        replica, particle = divmod(int(sizes.argmax()), len(self.metadata.particles))
        if type(self.potential).describe_strain is not Potential.describe_strain:
            with contextlib.suppress(Exception):  # the message is about something else
                return f"; {self.potential.describe_strain(self.buffers.batch[replica].to(self.device))}"
        if not np.isfinite(forces).all():
            return ""
        label = self.metadata.particles.label(particle)
        return f"; the largest force, {sizes.max():.3g} kJ/mol/nm, is on {label}"


_loaded: weakref.WeakValueDictionary[tuple[ModelFile, EvaluationOptions], Potential] = weakref.WeakValueDictionary()
_loading = threading.Lock()
