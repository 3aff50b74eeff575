"""What ``flowbridge density`` does: run quantum Monte Carlo with a progress bar, print properties with errors, write files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError, InputError
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from ase.units import Bohr, Debye, Hartree
from rich.console import Console
from rich.table import Table

from ..calculators.qmc import density_run
from ..calculators.qmc.calculator import HELLMANN_FEYNMAN, QMCCalculator
from ..calculators.qmc.density.densities import DensityModel, GaussianDensity
from ..calculators.qmc.electronic_structure import reference_density
from ..calculators.qmc.figures import draw_density
from ..calculators.qmc.properties.potential_charges import potential_charges
from ..calculators.qmc.properties.properties import DensityProperties
from ..calculators.qmc.storage import save_density, save_wave_function
from ..core.atomic_files import write_whole
from ..core.errors import ConfigurationError
from ..core.execution.progress import progress_bar

_NOTHING = 1e-6  # an error that small is rounding, of what the symmetry of the molecule leaves no choice
VACUUM = 3.0  # Angstrom, around a molecule that comes without a cell


@dataclass(frozen=True)
class DensityRequest:
    """What was asked for on the command line.

    Attributes:
        structure: file with the molecule, any format of ASE.
        output: folder for results.
        parameters: of :class:`~flowbridge.calculators.qmc.calculator.QMCCalculator`.
        spacing: of the cube file, Angstrom.
        reference: ``"hf"``, ``"ccsd"`` or ``"none"``: what the difference map subtracts and the table compares with.
        force_field: OpenMM XML file to write with charges fitted to the electrostatic potential; None for none.
    """

    structure: Path
    output: Path
    parameters: dict[str, Any]
    spacing: float
    reference: str
    force_field: Path | None = None


def compute_and_print(request: DensityRequest) -> None:
    """Compute the density of a molecule, print its properties, and write table, picture, cube and model file.

    Raises:
        ConfigurationError: for a structure or parameters that cannot be used.
    """
    atoms = _read(request.structure)
    begin = time.monotonic()
    with progress_bar("starting", 1) as bar:

        def announce(progress: density_run.DensityProgress) -> None:
            bar.update(progress.done, progress.message, description=progress.stage, total=progress.total)

        try:
            calculator = QMCCalculator(
                directory=request.output / "work", announce=announce, forces=HELLMANN_FEYNMAN, **request.parameters
            )
            atoms.calc = calculator
            atoms.get_forces()
        except (InputError, CalculatorSetupError) as error:
            raise ConfigurationError(str(error)) from error
        bar.update(0, request.reference, description="reference", total=1)
        reference: DensityModel | None = None
        if request.reference != "none":
            found = reference_density(calculator.run.molecule, request.reference)
            reference = GaussianDensity.from_reference(calculator.run.molecule, found)
        bar.update(0, str(request.output), description="files", total=1)
        rows = table_rows(calculator, reference)
        if request.force_field is not None:
            rows += _potential_charges(request.force_field, atoms, calculator)
        _write(request, atoms, calculator, reference, rows)
    _print(request, atoms, rows, time.monotonic() - begin)


def _read(structure: Path) -> Atoms:
    try:
        atoms = ase.io.read(structure)
    except (OSError, ValueError, IndexError, KeyError, StopIteration, ase.io.formats.UnknownFileTypeError) as error:
        raise ConfigurationError(f"{structure}: ASE cannot read it ({type(error).__name__}: {error})") from error
    if isinstance(atoms, list):
        raise ConfigurationError(f"{structure}: holds {len(atoms)} structures, and one is needed")
    if not atoms.pbc.any() and atoms.cell.rank < 3:
        atoms.center(vacuum=VACUUM)
    return atoms


def table_rows(calculator: QMCCalculator, reference: DensityModel | None) -> list[dict[str, Any]]:
    """Return name, unit, value, error and, where there is one, the reference's value of every number."""
    properties, samples = calculator.properties, calculator.samples
    compared = None if reference is None else DensityProperties(reference, properties.grid)
    labels = properties.molecule.labels()
    rows: list[dict[str, Any]] = []

    def add(name: str, unit: str, value: Any, error: Any, other: Any = None, factor: float = 1.0) -> None:
        numbers = [None if number is None else float(number) * factor for number in (value, error, other)]
        rows.append({"name": name, "unit": unit, "value": numbers[0], "error": numbers[1], "reference": numbers[2]})

    def add_all(names: list[str], unit: str, method: str, places: list[Any], factor: float = 1.0) -> None:
        found = getattr(properties, method)()
        other = None if compared is None or method == "contact_densities" else getattr(compared, method)().value
        for name, place in zip(names, places, strict=True):
            add(name, unit, found.value[place], found.error[place], None if other is None else other[place], factor)

    add("energy", "Hartree", *samples.energy)
    add("kinetic energy", "Hartree", *samples.average(samples.kinetic))
    add("potential energy", "Hartree", *samples.average(samples.potential))
    add("variance of the local energy", "Hartree²", samples.variance, None)
    atoms = list(range(len(labels)))
    add_all([f"dipole {axis}" for axis in "xyz"], "D", "dipole", [0, 1, 2], Bohr / Debye)
    add_all([f"quadrupole {axis}{axis}" for axis in "xyz"], "e bohr²", "quadrupole", [(0, 0), (1, 1), (2, 2)])
    add_all(["<r²>"], "bohr²", "second_moment", [()])
    add_all([f"charge (Hirshfeld) of {label}" for label in labels], "e", "hirshfeld_charges", atoms)
    add_all([f"charge (Becke) of {label}" for label in labels], "e", "becke_charges", atoms)
    add_all([f"contact density of {label}" for label in labels], "e/bohr³", "contact_densities", atoms)
    if properties.molecule.spin and calculator.parameters["samples"] is None:
        spins = calculator.run.spin_contact_densities
        for label, value, error in zip(labels, *spins, strict=True):
            add(f"spin density at {label}", "e/bohr³", value, error)
    forces = properties.forces()
    for label, force, errors in zip(labels, *forces, strict=True):
        size = float(np.linalg.norm(force))
        along = force / max(size, 1e-12)
        error = np.linalg.norm(along * errors)
        add(f"force (Hellmann-Feynman) on {label}", "eV/Å", size, error, factor=Hartree / Bohr)
    net = calculator.get_net_force()
    add("net force", "eV/Å", np.linalg.norm(net.value), np.linalg.norm(net.error))
    return rows


def _potential_charges(file: Path, atoms: Atoms, calculator: QMCCalculator) -> list[dict[str, Any]]:
    """Fit charges to the electrostatic potential, write the force field, and return rows for the table."""
    from ..integrations.openmm.systems.potential_charges import write_force_field
    from ..integrations.openmm.systems.topologies import molecule_topology

    found = potential_charges(calculator.properties)
    neighbours = build_neighbor_list(atoms, natural_cutoffs(atoms), self_interaction=False, bothways=False)
    bonds = [(i, int(j)) for i in range(len(atoms)) for j in neighbours.get_neighbors(i)[0]]
    topology = molecule_topology(list(atoms.symbols), bonds)
    write_force_field(file, topology, found.charges.value)
    labels = calculator.properties.molecule.labels()
    rows = [
        {
            "name": f"charge (potential) of {label}",
            "unit": "e",
            "value": float(value),
            "error": float(error),
            "reference": None,
        }
        for label, value, error in zip(labels, *found.charges, strict=True)
    ]
    rows.append(
        {
            "name": "potential missed by these charges", "unit": "", "value": found.relative_error, "error": None,
            "reference": None,
        }
    )  # fmt: skip
    return rows


def _write(
    request: DensityRequest,
    atoms: Atoms,
    calculator: QMCCalculator,
    reference: DensityModel | None,
    rows: list[dict[str, Any]],
) -> None:
    name = request.structure.stem
    calculator.write_cube(request.output / f"{name}.cube", atoms, request.spacing)
    save_density(request.output / f"{name}.density.safetensors", calculator.density)
    if request.parameters.get("samples") is None:
        save_wave_function(request.output / f"{name}.wave_function.safetensors", calculator.wave_function)
    content = {"structure": str(request.structure), "parameters": request.parameters, "properties": rows}
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_whole((request.output / f"{name}.json").absolute(), text.encode())
    draw_density(
        request.output / f"{name}.png", calculator.properties, reference,
        f"{atoms.get_chemical_formula()}: {calculator.parameters['model']} density from quantum Monte Carlo",
        {"hf": "Hartree-Fock", "ccsd": "CCSD", "none": ""}[request.reference],
    )  # fmt: skip


def _print(request: DensityRequest, atoms: Atoms, rows: list[dict[str, Any]], seconds: float) -> None:
    console = Console()
    label = {"hf": "Hartree-Fock", "ccsd": "CCSD"}.get(request.reference)
    table = Table("property", "value", "error", "unit", *([label] if label else []), box=None)
    for index in (1, 2, 4):
        if index < len(table.columns):
            table.columns[index].justify = "right"
    for row in rows:
        digits = _digits(row["error"])
        certain = row["error"] is not None and row["error"] < _NOTHING
        cells = [
            row["name"],
            _decimal(row["value"], digits),
            "" if row["error"] is None else "symmetry" if certain else f"{row['error']:.{digits}f}",
            row["unit"],
        ]
        if label:
            cells.append("" if row["reference"] is None else _decimal(row["reference"], digits))
        table.add_row(*cells)
    console.print(table)
    name = request.structure.stem
    console.print(
        f"{atoms.get_chemical_formula()}, {seconds:.0f} s. In {request.output}: {name}.json, {name}.png, {name}.cube, "
        f"{name}.density.safetensors",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _decimal(value: float, digits: int) -> str:
    """Return a number with so many decimals, and zero without a sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0.0 else text


def _digits(error: float | None) -> int:
    """Return decimals that show an error with two significant digits."""
    if error is None or error < _NOTHING:
        return 4
    return int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
