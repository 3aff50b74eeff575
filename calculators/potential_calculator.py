"""Learned potentials as ASE calculators."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import (
    BaseCalculator,
    CalculatorSetupError,
    InputError,
    PropertyNotImplementedError,
    all_changes,
    register_calculator_class,
)
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from ..core.compilation.building import accelerated
from ..core.compilation.compiled_potential import direct_program
from ..core.errors import MoleculeMismatchError, NonFiniteEnergyError
from ..core.model import what_is
from ..core.model_files.files import load, matches_its_file
from ..core.potential import Potential

KILOJOULE_PER_MOLE = units.kJ / units.mol
"""eV"""


class AtomsMismatchError(InputError, MoleculeMismatchError):
    """The Atoms are not the molecule that the potential was made for."""


class PotentialCalculator(BaseCalculator):
    """A potential, or the model file that holds one, as an ASE calculator.

    Properties are ``energy``, ``free_energy`` (the same) and ``forces``, and ``stress`` for a periodic
    potential, in ASE's units. Results are kept until positions, atomic numbers, cell or periodic boundary
    conditions change. ``atoms.info``, momenta and constraints play no part.

    Pickling and ``copy.deepcopy`` store path and digest of the model file where the potential is still what
    the file holds, and the potential itself otherwise.

    Args:
        potential: a potential, used as it is, or the path of a model file.
        global_parameters: values for the potential's global parameters that differ from their defaults; see
            :meth:`set_global_parameters`.
        dtype: floating type to convert parameters and positions to, say ``"float32"``; None keeps the
            parameters and passes float64 positions. An object is copied before its parameters are converted.
        device: torch device to evaluate on; None keeps an object where it is and puts a file's model on the
            CPU.
        compilation: ``"auto"`` compiles the model of a file to machine code once and keeps that in the user's cache
            (what ``$FLOWBRIDGE_COMPILE`` says where it is set); an object stays as it is. ``"always"`` compiles, or
            fails; an object is then frozen in its present state. ``"cached"`` uses what is in the cache,
            ``"never"`` evaluates with torch.

    Raises:
        CalculatorSetupError: for a potential, dtype or parameter that cannot be used.
        CompilationError: when ``compilation`` is ``"always"`` and the potential cannot be compiled.
        ModelFileError: when the model file cannot be read.
    """

    implemented_properties = ["energy", "free_energy", "forces"]

    def __init__(
        self,
        potential: Potential | str | os.PathLike[str],
        *,
        global_parameters: dict[str, float] | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
        compilation: str = "auto",
    ) -> None:
        from_file = isinstance(potential, str | os.PathLike)
        if isinstance(potential, str | os.PathLike):
            potential = Potential.load(potential).requires_grad_(False)
        elif not isinstance(potential, Potential):
            raise CalculatorSetupError(
                f"potential must be a flowbridge Potential or the path of a model file, not {what_is(potential)}"
            )
        self._conversion = (None if dtype is None else str(dtype).removeprefix("torch."), device)
        if self._conversion[0] not in (None, "float32", "float64"):
            raise CalculatorSetupError(f"dtype must be float32, float64 or None, got {dtype!r}")
        self._source = potential.model_file if matches_its_file(potential) else None
        if self._conversion != (None, None):
            potential = _converted(copy.deepcopy(potential), *self._conversion)
        super().__init__()
        self.potential = potential
        metadata = potential.metadata
        if metadata.periodic:
            self.implemented_properties = [*type(self).implemented_properties, "stress"]
        self._numbers = np.array(metadata.particles.atomic_numbers)
        tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        self._dtype = torch.float64 if self._conversion[0] is None else getattr(torch, self._conversion[0])
        self._compilation = "never" if compilation == "auto" and not from_file else compilation
        self._evaluated = self._accelerated(from_file)
        self._periodic = metadata.periodic
        self._buffer = np.zeros((len(metadata.particles), 3))
        self._batch = torch.from_numpy(self._buffer)[None]
        self._program = direct_program(self._evaluated, 1, torch.float64) if self._dtype == torch.float64 else None
        self.set_global_parameters(**metadata.global_parameters)
        self.set_global_parameters(**(global_parameters or {}))

    def _accelerated(self, from_file: bool) -> Potential:
        """Return what energies and forces are asked of: compiled code, or the potential itself."""
        digest = self._source.digest if from_file and self._source is not None else None
        target = self.potential
        if not from_file and self._compilation != "never":
            target = copy.deepcopy(target).requires_grad_(False)
        return accelerated(target, mode=self._compilation, digest=digest, dtype=self._dtype)

    def set_global_parameters(self, **values: float) -> None:
        """Set global parameters of the potential and forget the results.

        Raises:
            CalculatorSetupError: for a name the potential does not have or a value that is not finite.
        """
        known = self.potential.metadata.global_parameters
        for name, value in values.items():
            if name not in known:
                raise CalculatorSetupError(
                    f"the potential has no global parameter {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
            if not math.isfinite(value):
                raise CalculatorSetupError(f"global parameter {name} must be a finite number, got {value!r}")
        self.parameters.update({name: float(value) for name, value in values.items()})
        self.reset()

    def reset(self) -> None:
        """Forget the last configuration and its results."""
        self.results = {}
        self._seen: tuple[bytes, ...] | None = None
        self._last: Atoms | None = None

    @property
    def atoms(self) -> Atoms | None:
        """A copy of the Atoms last calculated, None before; made when asked for, not at every step."""
        if self._last is None or self._seen is None:
            return None
        atoms = self._last.copy()
        atoms.positions = np.frombuffer(self._seen[0]).reshape(-1, 3)
        return atoms

    @atoms.setter
    def atoms(self, atoms: Atoms | None) -> None:
        self.reset()
        if atoms is not None:
            self._remember(atoms, list(all_changes))

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return which of positions, numbers, cell and pbc changed since the last calculation.

        Args:
            atoms: the present configuration.
            tol: accepted for ASE's sake; any difference counts.
        """
        if self._seen is None:
            return list(all_changes)
        return [name for name, now, then in zip(_COMPARED, _state(atoms), self._seen, strict=True) if now != then]

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Return a property in ASE's units, calculated only if the configuration changed.

        Raises:
            PropertyNotImplementedError: for a property the potential does not define.
            AtomsMismatchError, InputError: when the potential cannot be evaluated for these Atoms.
            NonFiniteEnergyError: for NaN or infinite positions, energies or forces.
        """
        if name not in self.implemented_properties:
            raise PropertyNotImplementedError(
                f"{name} is not defined for a {type(self.potential).__name__}"
                + (": stress needs a periodic potential" if name == "stress" else "")
            )
        if atoms is not None:
            changes = self.check_state(atoms)
            if changes:
                self.results = {}
                if not allow_calculation:
                    self.reset()
        else:
            atoms, changes = self.atoms, []
        if name not in self.results:
            if not allow_calculation:
                return None
            if atoms is None:
                raise InputError("no Atoms were calculated yet: pass atoms, or attach the calculator to them")
            self.calculate(atoms, [name], changes)
        result = self.results[name]
        return result.copy() if isinstance(result, np.ndarray) else result

    def calculate(
        self,
        atoms: Atoms,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Calculate energy and forces (and stress when asked for) of ``atoms`` and keep them in ``results``.

        Raises as :meth:`get_property`.
        """
        self.results = {}
        if self._seen is None or set(system_changes) - {"positions"}:
            self._check_atoms(atoms)
        cell = self._tensor(atoms.cell.array / units.nm) if self._periodic else None
        if self._program is not None:
            # Nothing besides the call: for a few atoms, compiled code takes as long as a handful of tensor operations.
            np.multiply(atoms.arrays["positions"], 1.0 / units.nm, out=self._buffer)
            rest = [torch.tensor(value, dtype=torch.float64) for value in self.parameters.values()]
            energies, rows = self._program([self._batch, *([] if cell is None else [cell]), *rest])
            energy, forces = energies.item(), rows.numpy()[0]
        else:
            result = self._evaluated.energy_and_forces(
                self._tensor(atoms.positions / units.nm), cell, **self.parameters
            )
            energy, forces = result.energy.item(), result.forces[0].detach().cpu().double().numpy()
        energy *= KILOJOULE_PER_MOLE
        results: dict[str, Any] = {"energy": energy, "free_energy": energy}
        results["forces"] = forces * (KILOJOULE_PER_MOLE / units.nm)
        # One dot product sees every NaN and infinity; which one it was is found out only then.
        if not math.isfinite(results["energy"] + np.vdot(results["forces"], results["forces"])):
            self._refuse(atoms.positions, results["energy"], results["forces"])
        if "stress" in properties and cell is not None:
            results["stress"] = self._stress(self._tensor(atoms.positions / units.nm), cell, atoms.get_volume())
        self._remember(atoms, system_changes)
        self.results = results

    def __reduce__(self) -> tuple[Callable[..., PotentialCalculator], tuple[Any, ...]]:
        """Pickle path and digest where the model file holds this potential, else the potential itself."""
        converted = self._conversion != (None, None)
        if converted and self._source is not None:
            reference: Any = (str(self._source.path), self._source.digest)
            return _restore, (type(self), reference, dict(self.parameters), *self._conversion, self._compilation)
        # Whoever holds the potential may have trained it since, or replaced the file.
        if not converted and self.potential.model_file is not None and matches_its_file(self.potential):
            reference = (str(self.potential.model_file.path), self.potential.model_file.digest)
        else:
            reference = self.potential
        return _restore, (type(self), reference, dict(self.parameters), None, None, self._compilation)

    def _get_name(self) -> str:
        return f"flowbridge-{type(self.potential).kind or type(self.potential).__name__.lower()}"

    def todict(self) -> dict[str, Any]:
        """Return what ASE's databases store: model file, digest and global parameters."""
        described: dict[str, Any] = {"global_parameters": dict(self.parameters)}
        if self._source is not None:
            described.update(model_file=str(self._source.path), digest=self._source.digest)
        return described

    def _tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values[None]).to(self._device, self._dtype)

    def _refuse(self, positions: np.ndarray[Any, Any], energy: float, forces: np.ndarray[Any, Any]) -> None:
        """Raise NonFiniteEnergyError that names what is NaN or infinite, if anything is."""
        name = type(self.potential).__name__
        if not np.isfinite(positions).all():
            raise NonFiniteEnergyError(f"the positions of {self._labels(positions)} are NaN or infinite")
        if not math.isfinite(energy):
            raise NonFiniteEnergyError(
                f"{name} gives an energy of {energy} eV at finite positions: the structure has left the "
                "region where the potential is defined"
            )
        if not np.isfinite(forces).all():
            raise NonFiniteEnergyError(f"{name} gives NaN or infinite forces on {self._labels(forces)}")

    def _labels(self, rows: np.ndarray[Any, Any]) -> str:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        shown = ", ".join(self.potential.metadata.particles.label(int(index)) for index in bad[:3])
        return f"{len(bad)} of {len(rows)} atoms, first {shown}"

    def _remember(self, atoms: Atoms, changes: Sequence[str]) -> None:
        if self._last is None or set(changes) - {"positions"}:
            self._last = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        self._seen = _state(atoms)

    def _check_atoms(self, atoms: Atoms) -> None:
        molecule = self.potential.metadata.particles
        if len(atoms) != len(molecule):
            raise AtomsMismatchError(
                f"the potential was made for {len(molecule)} atoms, the Atoms have {len(atoms)} "
                f"({atoms.get_chemical_formula()})"
            )
        different = np.flatnonzero(atoms.numbers != self._numbers)
        if len(different):
            index = int(different[0])
            raise AtomsMismatchError(
                f"atom {index} is {atoms.symbols[index]} where the potential has "
                f"{chemical_symbols[self._numbers[index]]}, {molecule.label(index)} ({len(different)} atoms "
                "differ): the potential was made for another molecule or another order of its atoms"
            )
        if self.potential.metadata.periodic and not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise InputError(
                f"the potential is periodic in three directions, but the Atoms have "
                f"pbc={atoms.pbc.tolist()} and a cell of rank {atoms.cell.rank}: set atoms.cell and "
                "atoms.pbc = True"
            )
        if not self.potential.metadata.periodic and atoms.pbc.any():
            raise InputError(
                f"the potential is that of an isolated molecule, but the Atoms have "
                f"pbc={atoms.pbc.tolist()}: set atoms.pbc = False (and unwrap positions that cross the cell)"
            )

    def _stress(self, positions: torch.Tensor, cell: torch.Tensor, volume: float) -> np.ndarray[Any, Any]:
        """Return (1/V) dE/d(strain) in eV/Å³, in ASE's order xx, yy, zz, yz, xz, xy."""
        with torch.enable_grad():
            strain = torch.zeros(3, 3, dtype=positions.dtype, device=positions.device, requires_grad=True)
            deformation = torch.eye(3, dtype=positions.dtype, device=positions.device) + (strain + strain.T) / 2
            energy = self.potential(positions @ deformation, cell @ deformation, **self.parameters)
            (gradient,) = torch.autograd.grad(energy.sum(), strain)
        stress = gradient.detach().cpu().double().numpy() * KILOJOULE_PER_MOLE / volume
        if not np.isfinite(stress).all():
            raise NonFiniteEnergyError(f"{type(self.potential).__name__} gives a stress that is NaN or infinite")
        voigt: np.ndarray[Any, Any] = full_3x3_to_voigt_6_stress(stress)
        return voigt


_COMPARED = ("positions", "numbers", "cell", "pbc")


def _state(atoms: Atoms) -> tuple[bytes, ...]:
    """Return the bytes of what results depend on: a tenth of the cost of comparing arrays with numpy."""
    arrays = atoms.arrays
    return arrays["positions"].tobytes(), arrays["numbers"].tobytes(), atoms.cell.array.tobytes(), atoms.pbc.tobytes()


def _converted(potential: Potential, dtype: str | None, device: str | None) -> Potential:
    return potential.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))


def _restore(
    cls: type[PotentialCalculator],
    reference: Potential | tuple[str, str],
    global_parameters: dict[str, float],
    dtype: str | None,
    device: str | None,
    compilation: str,
) -> PotentialCalculator:
    """Rebuild a calculator from its pickle; raises ModelFileError when the model file is gone or changed."""
    if isinstance(reference, tuple):
        path, digest = reference
        load(path, digest=digest)  # refuses a file that was replaced
        return cls(path, global_parameters=global_parameters, dtype=dtype, device=device, compilation=compilation)
    return cls(reference, global_parameters=global_parameters, dtype=dtype, device=device, compilation=compilation)


# ase.calculators.calculator.get_calculator_class("flowbridge"), for programs that go by names.
register_calculator_class("flowbridge", PotentialCalculator)
