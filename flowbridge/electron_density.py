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
from ase.units import Bohr, Hartree
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .calculators.qmc import density_run
from .calculators.qmc.calculator import HELLMANN_FEYNMAN, QMCCalculator
from .calculators.qmc.electronic_structure import reference_density
from .core.bootstrap import Estimate
from .core.errors import ConfigurationError

DEBYE = 0.2081943  # e Angstrom
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
    stderr = Console(stderr=True)
    begin = time.monotonic()
    columns = (
        TextColumn("{task.fields[stage]:<14}"),
        BarColumn(),
        TextColumn("{task.fields[message]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("", total=1, stage="starting", message="")

        def announce(progress: density_run.Progress) -> None:
            bar.update(
                task, completed=progress.done, total=progress.total, stage=progress.stage, message=progress.message
            )

        try:
            calculator = QMCCalculator(
                directory=request.output / "work", announce=announce, forces=HELLMANN_FEYNMAN, **request.parameters
            )
            atoms.calc = calculator
            atoms.get_forces()
        except (InputError, CalculatorSetupError) as error:
            raise ConfigurationError(str(error)) from error
        bar.update(task, stage="reference", message=request.reference, completed=0, total=1)
        reference = None
        if request.reference != "none":
            from .calculators.qmc.densities import GaussianDensity

            found = reference_density(calculator.run.molecule, request.reference)
            reference = GaussianDensity.from_reference(calculator.run.molecule, found)
        bar.update(task, stage="files", message=str(request.output))
        _write(request, atoms, calculator, reference)
        fitted = _potential_charges(request, atoms, calculator) if request.force_field is not None else []
    rows = table_rows(atoms, calculator, reference) + fitted
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


def table_rows(atoms: Atoms, calculator: QMCCalculator, reference: Any) -> list[dict[str, Any]]:
    """Return name, unit, value, error and, where there is one, the reference's value of every number."""
    from .calculators.qmc.properties import DensityProperties

    properties = calculator.properties
    compared = None if reference is None else DensityProperties(reference, properties.grid)
    labels = properties.molecule.labels()
    rows: list[dict[str, Any]] = []

    def add(name: str, unit: str, estimate: Estimate[Any], factor: float = 1.0, other: Any = None) -> None:
        row = {
            "name": name,
            "unit": unit,
            "value": float(estimate.value) * factor,
            "error": float(estimate.error) * factor,
        }
        row["reference"] = None if other is None else float(other) * factor
        rows.append(row)

    samples = calculator.samples
    add("energy", "Hartree", samples.energy)
    add("kinetic energy", "Hartree", samples.average(samples.kinetic))
    add("potential energy", "Hartree", samples.average(samples.potential))
    rows.append(
        {
            "name": "variance of the local energy",
            "unit": "Hartree²",
            "value": samples.variance,
            "error": None,
            "reference": None,
        }
    )
    sizes: list[tuple[str, Any, Any]] = [
        ("", properties.dipole(), None if compared is None else compared.dipole().value)
    ]
    for _, estimate, other in sizes:
        for axis, name in enumerate("xyz"):
            add(
                f"dipole {name}", "D", Estimate(estimate.value[axis], estimate.error[axis]), Bohr / DEBYE,
                None if other is None else other[axis],
            )  # fmt: skip
    quadrupole = properties.quadrupole()
    other_quadrupole = None if compared is None else compared.quadrupole().value
    for a, b in ((0, 0), (1, 1), (2, 2)):
        add(
            f"quadrupole {'xyz'[a]}{'xyz'[b]}", "e bohr²", Estimate(quadrupole.value[a, b], quadrupole.error[a, b]), 1.0,
            None if other_quadrupole is None else other_quadrupole[a, b],
        )  # fmt: skip
    moment = properties.second_moment()
    add("<r²>", "bohr²", moment, 1.0, None if compared is None else compared.second_moment().value)
    for name, found, other in (
        (
            "charge (Hirshfeld) of",
            properties.hirshfeld_charges(),
            None if compared is None else compared.hirshfeld_charges(),
        ),
        ("charge (Becke) of", properties.becke_charges(), None if compared is None else compared.becke_charges()),
        ("contact density of", properties.contact_densities(), None),
    ):
        for index, label in enumerate(labels):
            unit = "e/bohr³" if "contact" in name else "e"
            add(
                f"{name} {label}", unit, Estimate(found.value[index], found.error[index]), 1.0,
                None if other is None else other.value[index],
            )  # fmt: skip
    forces = properties.forces()
    for index, label in enumerate(labels):
        size = float(np.linalg.norm(forces.value[index]))
        along = forces.value[index] / max(size, 1e-12)
        error = float(np.sqrt(np.sum((along * forces.error[index]) ** 2)))
        add(f"force (Hellmann-Feynman) on {label}", "eV/Å", Estimate(size, error), Hartree / Bohr)
    net = calculator.get_net_force()
    add("net force", "eV/Å", Estimate(np.linalg.norm(net.value), np.linalg.norm(net.error)))
    return rows


def _potential_charges(request: DensityRequest, atoms: Atoms, calculator: QMCCalculator) -> list[dict[str, Any]]:
    """Fit charges to the electrostatic potential, write the force field, and return rows for the table."""
    from ase.neighborlist import build_neighbor_list, natural_cutoffs

    from .calculators.qmc.potential_charges import potential_charges
    from .integrations.openmm.potential_charges import topology_of, write_force_field

    assert request.force_field is not None
    found = potential_charges(calculator.properties)
    neighbours = build_neighbor_list(atoms, natural_cutoffs(atoms), self_interaction=False, bothways=False)
    bonds = [(i, int(j)) for i in range(len(atoms)) for j in neighbours.get_neighbors(i)[0]]
    topology = topology_of(list(atoms.symbols), bonds)
    write_force_field(request.force_field, topology, found.charges.value)
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


def _write(request: DensityRequest, atoms: Atoms, calculator: QMCCalculator, reference: Any) -> None:
    from .calculators.qmc.figures import draw_density
    from .calculators.qmc.storage import save_density, save_wave_function

    name = request.structure.stem
    calculator.write_cube(request.output / f"{name}.cube", atoms, request.spacing)
    save_density(request.output / f"{name}.density.safetensors", calculator.density)
    if request.parameters.get("samples") is None:
        save_wave_function(request.output / f"{name}.wave_function.safetensors", calculator.wave_function)
    rows = table_rows(atoms, calculator, reference)
    content = {"structure": str(request.structure), "parameters": request.parameters, "properties": rows}
    part = request.output / f"{name}.json.part"
    part.write_text(json.dumps(content, indent=1, default=str) + "\n")
    part.replace(request.output / f"{name}.json")
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
        cells = [
            row["name"],
            f"{row['value']:.{digits}f}",
            "" if row["error"] is None else f"{row['error']:.{digits}f}",
            row["unit"],
        ]
        if label:
            cells.append("" if row["reference"] is None else f"{row['reference']:.{digits}f}")
        table.add_row(*cells)
    console.print(table)
    name = request.structure.stem
    console.print(
        f"{atoms.get_chemical_formula()}, {seconds:.0f} s. In {request.output}: {name}.json, {name}.png, {name}.cube, "
        f"{name}.density.safetensors",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _digits(error: float | None) -> int:
    """Return decimals that show an error with two significant digits."""
    if error is None or error <= 0.0:
        return 4
    return int(np.clip(1 - np.floor(np.log10(error)), 0, 6))
