"""Dynamics and forces of a model file through ASE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ase
import numpy as np
import torch
from ase import units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from ...calculators import PotentialCalculator
from ...core.potential import Particles
from ...integrations.openmm.sampling.flow_dynamics import SINGLE_MOLECULE_DTYPE

AseKind = Literal["nve", "langevin"]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_FRICTION_PER_PS = 10.0


@dataclass(frozen=True)
class AseRun:
    """Dynamics in ASE from ``positions`` ``(N, 3)`` nm: ``nve`` returns total energies, ``langevin`` temperatures."""

    model: Path
    positions: FloatArray
    temperature: float
    step_fs: float
    steps: int
    kind: AseKind
    seed: int


def atoms_of(particles: Particles, positions: FloatArray) -> ase.Atoms:
    """Return ``Atoms`` (Angstrom) of one configuration ``(N, 3)`` in nm."""
    return ase.Atoms(
        numbers=particles.atomic_numbers, masses=particles.masses, positions=np.asarray(positions) * units.nm
    )


def run_ase(run: AseRun) -> FloatArray:
    """Return total energies in kJ/mol (``nve``) or kinetic temperatures in K (``langevin``) after each step."""
    torch.set_num_threads(1)  # this function owns its worker process
    calculator = PotentialCalculator(run.model, dtype=SINGLE_MOLECULE_DTYPE)
    atoms = atoms_of(calculator.potential.metadata.particles, run.positions)
    atoms.calc = calculator
    random = np.random.default_rng(run.seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=run.temperature, rng=random)
    step = run.step_fs * units.fs
    if run.kind == "nve":
        dynamics: MolecularDynamics = VelocityVerlet(atoms, step)
    else:
        # fixcm=True rescales the noise of a molecule this small and heats it by more than a tenth.
        dynamics = Langevin(
            atoms,
            step,
            temperature_K=run.temperature,
            friction=_FRICTION_PER_PS / (1000 * units.fs),
            fixcm=False,
            rng=random,
        )
    values = np.empty(run.steps)
    for index in range(run.steps):
        dynamics.run(1)
        if run.kind == "nve":
            values[index] = atoms.get_total_energy() / (units.kJ / units.mol)
        else:
            values[index] = atoms.get_temperature()
    return values


def ase_forces(model: Path, positions: FloatArray) -> FloatArray:
    """Return forces ``(F, N, 3)`` in kJ/mol/nm of frames ``(F, N, 3)`` in nm, as ASE sees them."""
    calculator = PotentialCalculator(model, dtype=SINGLE_MOLECULE_DTYPE)
    forces = []
    for frame in positions:
        atoms = atoms_of(calculator.potential.metadata.particles, frame)
        atoms.calc = calculator
        forces.append(atoms.get_forces() / (units.kJ / units.mol / units.nm))
    return np.stack(forces)
