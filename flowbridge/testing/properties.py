"""Checks of a potential by itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..core.model_files.files import save
from ..core.potential import Potential
from .case import Case
from .report import Check, NamedCheck

_FORCE = 1e-5  # of the largest force: central differences extrapolated once in float64 do better by orders
_SAME = 1e-9  # relative: another order of sums
_STEP = 2e-4  # nm


def own_checks(case: Case, invariances: frozenset[str]) -> Iterator[NamedCheck]:
    """Yield the names and functions of the checks that apply."""
    every = (
        ("shapes and types", shapes_and_types, True),
        ("forces against finite differences", forces_are_the_gradient, True),
        ("batch against single configurations", batch_is_its_members, True),
        ("repeats itself, leaves its input alone", repeats_itself, True),
        ("positions in single precision", single_precision, True),
        (
            "defaults of global parameters",
            defaults_of_global_parameters,
            bool(case.potential.metadata.global_parameters),
        ),
        ("translation", translation, "translation" in invariances),
        ("rotation", rotation, "rotation" in invariances),
        ("translation of single particles by lattice vectors", lattice_translations, case.cell is not None),
        ("model file", model_file, True),
    )
    for name, function, applies in every:
        if applies:
            yield name, function


def shapes_and_types(name: str, case: Case) -> Check:
    """Energies ``(B,)`` float64 and forces ``(B, N, 3)``, detached; the energy is that of ``forward``."""
    energy = case.potential(case.positions, case.cell)
    raw = case.potential.energy_and_forces(case.positions, case.cell)
    batch, particles = case.positions.shape[:2]
    problems = []
    for what, tensor, shape in (
        ("forward's energy", energy, (batch,)),
        ("energy", raw.energy, (batch,)),
        ("forces", raw.forces, (batch, particles, 3)),
    ):
        if tuple(tensor.shape) != shape:
            problems.append(f"{what} has the shape {tuple(tensor.shape)}, expected {shape}")
        elif what != "forces" and tensor.dtype != torch.float64:
            problems.append(f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected float64")
    for what, tensor in (("energy", raw.energy), ("forces", raw.forces)):
        if tensor.requires_grad:
            problems.append(f"{what} of energy_and_forces is not detached")
    if problems:
        return Check(name, False, detail="; ".join(problems))
    return _compared(
        name,
        _largest(energy.detach() - raw.energy),
        case.allowed(_SAME) * case.energy_scale,
        "kJ/mol, forward against energy_and_forces",
    )


def forces_are_the_gradient(name: str, case: Case) -> Check:
    """Central differences along random directions and single coordinates, extrapolated to no step.

    Parameters in single precision are converted: their rounding would drown the differences.
    """
    case = case.in_double()
    batch, particles = case.positions.shape[:2]
    generator = case.generator()
    directions = [torch.randn(case.positions.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    directions = [direction / direction.flatten(1).norm(dim=1)[:, None, None] for direction in directions]
    for index in torch.randperm(3 * particles, generator=generator)[:6].tolist():
        single = torch.zeros(batch, 3 * particles, dtype=torch.float64)
        single[:, index] = 1.0
        directions.append(single.reshape(case.positions.shape))
    worst = 0.0
    for direction in directions:
        slope = (4.0 * _difference(case, direction, 0.5 * _STEP) - _difference(case, direction, _STEP)) / 3.0
        expected = -(case.reference.forces * direction).sum((1, 2))
        worst = max(worst, _largest(slope - expected))
    return _compared(name, worst / case.largest_force, _FORCE, "of the largest force")


def _difference(case: Case, direction: Tensor, step: float) -> Tensor:
    ahead = case.potential(case.positions + step * direction, case.cell).detach().double()
    behind = case.potential(case.positions - step * direction, case.cell).detach().double()
    return (ahead - behind) / (2.0 * step)


def batch_is_its_members(name: str, case: Case) -> Check:
    """Each configuration alone, and the batch in reverse, give the numbers of the batch."""
    worst = 0.0
    for index in range(len(case.positions)):
        alone = case.evaluate(case.positions[index : index + 1], _at(case, slice(index, index + 1)))
        worst = max(worst, _deviation(case, alone.energy, alone.forces, slice(index, index + 1)))
    backwards = case.evaluate(case.positions.flip(0), None if case.cell is None else case.cell.flip(0))
    worst = max(worst, _deviation(case, backwards.energy.flip(0), backwards.forces.flip(0), slice(None)))
    return _compared(name, worst, case.allowed(1e-7), "relative")


def repeats_itself(name: str, case: Case) -> Check:
    """The same input gives the same bits, and stays as it is."""
    positions = case.positions.clone()
    cell = None if case.cell is None else case.cell.clone()
    again = case.potential.energy_and_forces(positions, cell)
    if not torch.equal(positions, case.positions) or (cell is not None and not torch.equal(cell, _cell(case))):
        return Check(name, False, detail="the positions or the cell were changed in place")
    energy, forces = again.energy.double() - case.reference.energy, again.forces.double() - case.reference.forces
    return _compared(name, max(_largest(energy), _largest(forces)), 0.0, "kJ/mol or kJ/mol/nm")


def single_precision(name: str, case: Case) -> Check:
    """Positions in float32 are accepted, give a float64 energy, and one that is near."""
    cell = None if case.cell is None else case.cell.float()
    found = case.potential.energy_and_forces(case.positions.float(), cell)
    if found.energy.dtype != torch.float64:
        return Check(
            name, False, detail=f"the energy is {str(found.energy.dtype).removeprefix('torch.')}, expected float64"
        )
    # What rounding the positions may change, and what rounding inside may.
    rounding = 6e-8 * case.positions.abs().amax() * case.reference.forces.abs().sum((1, 2)).max()
    allowed = 1e-2 + 1e-4 * case.energy_scale + 10.0 * float(rounding)
    return _compared(name, _largest(found.energy - case.reference.energy), allowed, "kJ/mol")


def defaults_of_global_parameters(name: str, case: Case) -> Check:
    """Naming every global parameter with its default changes nothing."""
    values = case.potential.metadata.global_parameters
    given = case.potential.energy_and_forces(case.positions, case.cell, **values)
    return _compared(
        name, _largest(given.energy.double() - case.reference.energy), case.allowed(_SAME) * case.energy_scale,
        f"kJ/mol, with {', '.join(values)} given",
    )  # fmt: skip


def translation(name: str, case: Case) -> Check:
    """Moving everything changes nothing."""
    shift = torch.randn(len(case.positions), 1, 3, generator=case.generator(), dtype=torch.float64)
    moved = case.evaluate(case.positions + shift)
    return _compared(name, _deviation(case, moved.energy, moved.forces, slice(None)), case.allowed(1e-6), "relative")


def rotation(name: str, case: Case) -> Check:
    """Turning everything, the cell included, leaves the energy and turns the forces."""
    turn, triangular = torch.linalg.qr(torch.randn(3, 3, generator=case.generator(), dtype=torch.float64))
    turn = turn * torch.sign(torch.diagonal(triangular))
    turn = turn if float(torch.linalg.det(turn)) > 0.0 else -turn
    turned = case.evaluate(case.positions @ turn, None if case.cell is None else case.cell @ turn)
    return _compared(
        name,
        _deviation(case, turned.energy, turned.forces @ turn.T, slice(None)),
        case.allowed(1e-6),
        "relative, of energies and forces",
    )


def lattice_translations(name: str, case: Case) -> Check:
    """Any particle moved by lattice vectors is where it was."""
    batch, particles = case.positions.shape[:2]
    steps = torch.randint(-2, 3, (batch, particles, 3), generator=case.generator()).double()
    moved = case.evaluate(case.positions + steps @ _cell(case))
    return _compared(
        name, _deviation(case, moved.energy, moved.forces, slice(None)), case.allowed(1e-6),
        "relative",
    )  # fmt: skip


def model_file(name: str, case: Case) -> Check:
    """Saved and loaded, it gives the same bits."""
    if not case.potential.kind or type(case.potential).configuration is Potential.configuration:
        return Check(name, None, detail="has no kind or no configuration(), so it cannot be saved")
    before = case.potential.model_file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "potential.flow"
        try:
            save(case.potential, path)
        finally:
            case.potential.model_file = before
        loaded = type(case.potential).load(path)
    metadata, found = case.potential.metadata, loaded.metadata
    if found != metadata:
        return Check(name, False, detail=f"the metadata came back as {found}, they were {metadata}")
    again = loaded.energy_and_forces(case.positions, case.cell)
    return _compared(name, _largest(again.energy.double() - case.reference.energy), 0.0, "kJ/mol after loading")


def _cell(case: Case) -> Tensor:
    if case.cell is None:
        raise TypeError("the case has no cell")
    return case.cell


def _at(case: Case, selection: slice) -> Tensor | None:
    return None if case.cell is None else case.cell[selection]


def _deviation(case: Case, energy: Tensor, forces: Tensor, selection: slice) -> float:
    """Return the larger of the deviations of energies and forces, each relative to its size."""
    energies = _largest(energy.double() - case.reference.energy[selection]) / case.energy_scale
    return max(energies, _largest(forces.double() - case.reference.forces[selection]) / case.largest_force)


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def _compared(name: str, measured: float, allowed: float, detail: str) -> Check:
    return Check(name, measured <= allowed, measured, allowed, detail)
