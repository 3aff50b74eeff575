"""Learned potentials as ASE calculators."""

from __future__ import annotations

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
from ase.stress import full_3x3_to_voigt_6_stress

from ..core.errors import ConfigurationError, MoleculeMismatchError
from ..core.evaluator import EvaluationOptions, Evaluator
from ..core.matching import check_particles
from ..core.model_files.files import matches_its_file, opened
from ..core.potential import Particles, Potential

KILOJOULE_PER_MOLE = units.kJ / units.mol
"""eV"""


class AtomsMismatchError(InputError, MoleculeMismatchError):
    """The Atoms are not the molecule that the potential was made for."""


class PotentialSetupError(CalculatorSetupError, ConfigurationError):
    """A potential, an option or a global parameter cannot be used."""


class _AseEvaluator(Evaluator):
    noun, energy_unit = "atoms", "eV"


class PotentialCalculator(BaseCalculator):
    """A potential, or the model file that holds one, as an ASE calculator.

    Properties are ``energy``, ``free_energy`` (the same) and ``forces``, and ``stress`` for a periodic
    potential, in ASE's units. Results are kept until positions, atomic numbers, cell or periodic boundary
    conditions change. ``atoms.info``, momenta and constraints play no part.

    Pickling and ``copy.deepcopy`` store path and digest of the model file where the potential is still what
    the file holds, and the potential itself otherwise.

    Args:
        potential: a potential, used as it is, or the path of a model file, whose model all that evaluate the file share.
        global_parameters: values for the potential's global parameters that differ from their defaults; see
            :meth:`set_global_parameters`.
        dtype: floating type; see :class:`~flowbridge.core.evaluator.EvaluationOptions`, as for the next two.
        device: torch device.
        compilation: whether to compile.

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
        super().__init__()
        try:
            self.evaluator = _AseEvaluator.of(
                potential, EvaluationOptions(dtype=dtype, device=device, compilation=compilation)
            )
        except ConfigurationError as error:
            raise PotentialSetupError(str(error)) from error
        if self.potential.metadata.periodic:
            self.implemented_properties = [*type(self).implemented_properties, "stress"]
        self.set_global_parameters(**{**self.potential.metadata.global_parameters, **(global_parameters or {})})

    @property
    def potential(self) -> Potential:
        """The potential."""
        return self.evaluator.potential

    def set_global_parameters(self, **values: float) -> None:
        """Set global parameters of the potential and forget the results.

        Raises:
            CalculatorSetupError: for a name the potential does not have or a value that is not finite.
        """
        try:
            self.parameters = self.evaluator.parameters({**self.parameters, **values})
        except ConfigurationError as error:
            raise PotentialSetupError(str(error)) from error
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
        self._check_atoms(atoms, all_changes if self._seen is None else system_changes)
        periodic = self.evaluator.metadata.periodic
        cell = atoms.cell.array / units.nm if periodic else None
        np.multiply(atoms.arrays["positions"], 1.0 / units.nm, out=self.evaluator.buffers.positions)
        energy, forces = self.evaluator.evaluate(cell, self.parameters)
        energy *= KILOJOULE_PER_MOLE
        results = {"energy": energy, "free_energy": energy, "forces": forces * (KILOJOULE_PER_MOLE / units.nm)}
        if "stress" in properties and cell is not None:
            stress = self.evaluator.stress(cell, self.parameters) * (KILOJOULE_PER_MOLE / units.nm**3)
            results["stress"] = full_3x3_to_voigt_6_stress(stress)  # in ASE's order xx, yy, zz, yz, xz, xy
        self._remember(atoms, system_changes)
        self.results = results

    def __reduce__(self) -> tuple[Callable[..., PotentialCalculator], tuple[Any, ...]]:
        """Pickle path and digest where the model file holds this potential, else the potential itself."""
        options, potential = self.evaluator.options, self.potential
        source = self.evaluator.source if options.converts else potential.model_file
        # Whoever holds the potential may have trained it since, or replaced the file.
        if source is not None and (options.converts or matches_its_file(potential)):
            return _restore, (
                type(self), (str(source.path), source.digest), dict(self.parameters), options.dtype, options.device,
                options.compilation,
            )  # fmt: skip
        return _restore, (type(self), potential, dict(self.parameters), None, None, options.compilation)

    def _get_name(self) -> str:
        return f"flowbridge-{type(self.potential).kind or type(self.potential).__name__.lower()}"

    def todict(self) -> dict[str, Any]:
        """Return what ASE's databases store: model file, digest and global parameters."""
        described: dict[str, Any] = {"global_parameters": dict(self.parameters)}
        if self.evaluator.source is not None:
            path, digest = self.evaluator.source
            described.update(model_file=str(path), digest=digest)
        return described

    def _remember(self, atoms: Atoms, changes: Sequence[str]) -> None:
        if self._last is None or set(changes) - {"positions"}:
            self._last = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        self._seen = _state(atoms)

    def _check_atoms(self, atoms: Atoms, changes: Sequence[str]) -> None:
        if "numbers" in changes:
            given = Particles(("",) * len(atoms), tuple(atoms.numbers.tolist()), (0.0,) * len(atoms))
            try:
                check_particles(given, self.potential.metadata.particles, whole=f"Atoms {atoms.get_chemical_formula()}")
            except MoleculeMismatchError as error:
                raise AtomsMismatchError(str(error)) from error
        if not {"cell", "pbc"}.intersection(changes):
            return
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


_COMPARED = ("positions", "numbers", "cell", "pbc")


def _state(atoms: Atoms) -> tuple[bytes, ...]:
    """Return the bytes of what results depend on: a tenth of the cost of comparing arrays with numpy."""
    arrays = atoms.arrays
    return arrays["positions"].tobytes(), arrays["numbers"].tobytes(), atoms.cell.array.tobytes(), atoms.pbc.tobytes()


def _restore(
    cls: type[PotentialCalculator],
    reference: Potential | str | tuple[str, str],
    global_parameters: dict[str, float],
    dtype: str | None,
    device: str | None,
    compilation: str,
) -> PotentialCalculator:
    """Rebuild a calculator from its pickle; raises ModelFileError when the model file is gone or changed."""
    if isinstance(reference, tuple):
        opened(reference[0], digest=reference[1])  # refuses a file that was replaced
        reference = reference[0]
    return cls(reference, global_parameters=global_parameters, dtype=dtype, device=device, compilation=compilation)


# ase.calculators.calculator.get_calculator_class("flowbridge"), for programs that go by names.
register_calculator_class("flowbridge", PotentialCalculator)
