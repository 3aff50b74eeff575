"""Checks of a potential through every adapter at hand: the engines must give what the potential gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from ..core.energy import as_batched_energy
from ..core.potential import Potential
from .case import Case, case_of
from .report import Check, ConformanceReport, NamedCheck

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_PLATFORMS = {"Reference": 1e-8, "CPU": 1e-3, "OpenCL": 1e-3, "CUDA": 1e-3, "HIP": 1e-3}
"""Allowed deviation, relative: all platforms but Reference keep positions in single precision."""


def check_adapter(
    name: str,
    evaluate: Callable[[Potential, FloatArray, FloatArray | None], tuple[FloatArray, FloatArray]],
    potential: Potential,
    positions: torch.Tensor | None = None,
    cell: torch.Tensor | None = None,
    *,
    allowed: float = 1e-7,
) -> ConformanceReport:
    """Check that an engine gives what the potential gives, and return the report if it does.

    Args:
        name: the engine's, for messages.
        evaluate: from the potential, positions ``(B, N, 3)`` in nm and cells ``(B, 3, 3)`` in nm or None to energies ``(B,)``
            in kJ/mol and forces ``(B, N, 3)`` in kJ/mol/nm, computed through the adapter.
        potential: what is evaluated.
        positions: typical configurations as for :func:`~flowbridge.testing.check_potential`.
        cell: as there.
        allowed: relative deviation of energies and forces.

    Raises:
        ConformanceError: where they differ by more.
    """
    case = case_of(potential, positions, cell, 4, 0)
    energies, forces = evaluate(potential, case.positions.numpy(), None if case.cell is None else case.cell.numpy())
    report = ConformanceReport(type(potential).__name__, (_agreement(case, name, energies, forces, allowed),))
    report.require()
    return report


def adapter_checks() -> Iterator[NamedCheck]:
    """Yield the names and functions of the checks that can run here."""
    yield "batched energies", batched_energies
    yield "ASE calculator", ase_calculator
    for index in range(openmm.Platform.getNumPlatforms()):
        yield f"OpenMM on {openmm.Platform.getPlatform(index).getName()}", openmm_force


def batched_energies(name: str, case: Case) -> Check:
    """The interface that training and reweighting use; it knows no cell."""
    if case.cell is not None:
        return Check(name, None, detail="of a periodic potential need its cell; they are for isolated molecules")
    energies, forces = as_batched_energy(case.potential).energies_and_forces(case.positions.numpy())
    return _agreement(case, name, energies, forces, 1e-7)


def ase_calculator(name: str, case: Case) -> Check:
    """:class:`~flowbridge.calculators.PotentialCalculator`, converted back from eV and Angstrom."""
    import ase
    from ase import units

    from ..calculators import PotentialCalculator

    energies, forces = [], []
    for index, positions in enumerate(case.positions.numpy()):
        cell = None if case.cell is None else case.cell[index].numpy() * units.nm
        atoms = ase.Atoms(
            numbers=case.potential.metadata.particles.atomic_numbers, positions=positions * units.nm, cell=cell,
            pbc=cell is not None,
        )  # fmt: skip
        atoms.calc = PotentialCalculator(case.potential)
        energies.append(atoms.get_potential_energy() / (units.kJ / units.mol))
        forces.append(atoms.get_forces() / (units.kJ / units.mol / units.nm))
    return _agreement(case, name, np.array(energies), np.array(forces), 1e-7)


def openmm_force(name: str, case: Case) -> Check:
    """``add_potential`` on the platform of OpenMM that the last word of the name is."""
    from ..integrations.openmm import add_potential, particle_system

    platform = name.split()[-1]
    system = particle_system(case.potential)
    boxes = None if case.cell is None else case.cell.numpy()
    if boxes is not None:
        if np.abs(np.triu(boxes, 1)).max() > 0.0:
            return Check(
                name, None, detail="OpenMM wants cells in its reduced form, with a along x and b in the xy plane"
            )
        system.setDefaultPeriodicBoxVectors(*boxes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a potential that is in no file: nothing is serialised here
        add_potential(system, case.potential)
    try:
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform(platform))
    except openmm.OpenMMException as error:
        return Check(name, None, detail=f"does not work here: {error}")
    energies, forces = [], []
    for index, positions in enumerate(case.positions.numpy()):
        if boxes is not None:
            context.setPeriodicBoxVectors(*boxes[index])
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return _agreement(case, name, np.array(energies), np.array(forces), _PLATFORMS.get(platform, 1e-3))


def _agreement(case: Case, name: str, energies: FloatArray, forces: FloatArray, allowed: float) -> Check:
    energy = float((torch.as_tensor(energies) - case.reference.energy).abs().max()) / case.energy_scale
    force = float((torch.as_tensor(forces) - case.reference.forces).abs().max()) / case.largest_force
    difference, allowed = max(energy, force), case.allowed(allowed)
    return Check(name, difference <= allowed, difference, allowed, "relative, of energies and forces")
