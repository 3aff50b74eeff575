"""What the figures of a report are drawn from, read from the folders of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.samples import WeightedSamples
from ...core.units import thermal_energy
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..stages import Done
from . import reweight, simulate
from .bonded_terms import TermType, angle_types, bond_types
from .configuration import Workflow
from .evaluation import named_torsions

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_MOST_TYPES = 8  # panels of the figures of bonds and of angles


@dataclass(frozen=True)
class Torsions:
    """Values in degrees of each named torsion, ``(S,)``, in one ensemble, and their log-weights (None: all equal)."""

    values: Mapping[str, FloatArray]
    log_weights: FloatArray | None = None


@dataclass(frozen=True)
class Marginal:
    """Values of one quantity in the MD frames and in the flow's samples.

    Attributes:
        label: what it is.
        md: ``(F * T,)``.
        flow: ``(S * T,)``, T values of each sample in turn.
        terms: T.
    """

    label: str
    md: np.ndarray[Any, Any]
    flow: np.ndarray[Any, Any]
    terms: int


@dataclass(frozen=True)
class ReportData:
    """Everything that is drawn.

    Attributes:
        training: torsions of the training frames.
        driven: torsions of Langevin dynamics under the energy of the flow; None without dynamics.
        flow: torsions of the flow's samples, all sets, with their weights.
        log_weights: ``(S,)`` of each independent set.
        bonds: lengths in nm by type.
        angles: in degrees by type.
        left_out: labels of the types that find no place in the figures.
        energy: potential energy over kT.
        md_frames: number of MD frames in the marginals, training and held-out.
        energies: total energies in kJ/mol against time of ``nve_flow_0``, ``nve_force_field_0`` and ``ase_nve``.
        temperatures: kinetic temperatures in K against time, by run.
        degrees_of_freedom: internal ones, 3N - 6.
    """

    training: Torsions
    driven: Torsions | None
    flow: Torsions
    log_weights: tuple[FloatArray, ...]
    bonds: tuple[Marginal, ...]
    angles: tuple[Marginal, ...]
    left_out: tuple[str, ...]
    energy: Marginal
    md_frames: int
    energies: Mapping[str, FloatArray]
    temperatures: Mapping[str, FloatArray]
    degrees_of_freedom: int

    @property
    def pooled_log_weights(self) -> FloatArray:
        """Log-weights ``(S,)`` of all sets in the order of the marginals; the sets share one constant."""
        return np.concatenate(self.log_weights)


def gather(workflow: Workflow, molecule: MolecularSystem, done: Done) -> ReportData:
    """Read what ``simulate``, ``dynamics`` (if it was done) and ``reweight`` have kept."""
    frames = simulate.load_frames(done["simulate"])
    dynamics = done["dynamics"].folder if "dynamics" in done else None
    md = np.concatenate([frames.training.positions, frames.held_out.positions])
    md_energies = np.concatenate([frames.training.energies, frames.held_out.energies])
    particles = particles_from_topology(molecule.topology, molecule.system)
    bonds, angles = bond_types(particles), angle_types(particles)
    shown = [*bonds[:_MOST_TYPES], *angles[:_MOST_TYPES]]
    values: list[list[np.ndarray[Any, Any]]] = [[] for _ in shown]
    torsions: list[dict[str, FloatArray]] = []
    log_weights, reduced = [], []
    for number in range(workflow.reweight.independent_sets):
        samples = WeightedSamples.load(reweight.sample_file(done["reweight"], number))
        torsions.append(named_torsions(workflow, molecule, samples.positions))
        for kept, term in zip(values, shown, strict=True):
            kept.append(term.values(samples.positions).ravel())
        log_weights.append(samples.log_weights)
        reduced.append(samples.reduced_potentials["target"])
    marginals = [_marginal(term, md, kept) for term, kept in zip(shown, values, strict=True)]
    count = min(len(bonds), _MOST_TYPES)
    kT = thermal_energy(workflow.molecule.temperature)
    return ReportData(
        training=Torsions(named_torsions(workflow, molecule, frames.training.positions)),
        driven=None if dynamics is None else Torsions(_driven_torsions(workflow, molecule, dynamics)),
        flow=Torsions(
            {name: np.concatenate([one[name] for one in torsions]) for name in workflow.molecule.torsions},
            np.concatenate(log_weights),
        ),
        log_weights=tuple(log_weights),
        bonds=tuple(marginals[:count]),
        angles=tuple(marginals[count:]),
        left_out=tuple(term.label for term in [*bonds[_MOST_TYPES:], *angles[_MOST_TYPES:]]),
        energy=Marginal("U / kT", md_energies / kT, np.concatenate(reduced), 1),
        md_frames=len(md),
        energies={} if dynamics is None else _kept_runs(dynamics, ("nve_flow_0", "nve_force_field_0", "ase_nve")),
        temperatures={} if dynamics is None else _temperatures(dynamics),
        degrees_of_freedom=3 * len(particles) - 6,
    )


def _marginal(term: TermType, md: FloatArray, flow: list[np.ndarray[Any, Any]]) -> Marginal:
    return Marginal(term.label, term.values(md).ravel(), np.concatenate(flow), len(term.atoms))


def _langevin_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("langevin_*_frames.npz"))


def _driven_torsions(workflow: Workflow, molecule: MolecularSystem, folder: Path) -> dict[str, FloatArray]:
    parts: dict[str, list[FloatArray]] = {name: [] for name in workflow.molecule.torsions}
    if not parts:
        return {}
    for file in _langevin_files(folder):
        with np.load(file, allow_pickle=False) as data:
            for name, values in named_torsions(workflow, molecule, data["positions"].astype(np.float64)).items():
                parts[name].append(values.ravel())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _kept_runs(folder: Path, names: tuple[str, ...]) -> dict[str, FloatArray]:
    runs: dict[str, FloatArray] = {}
    for name in names:
        file = folder / f"{name}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as data:
                runs[name] = data["energy"]
    return runs


def _temperatures(folder: Path) -> dict[str, FloatArray]:
    """Return temperatures of the Langevin runs of the flow: OpenMM's averaged over workers, and ASE's."""
    found: dict[str, FloatArray] = {}
    traces = []
    for file in _langevin_files(folder):
        with np.load(file, allow_pickle=False) as data:
            traces.append(data["temperature"])
    if traces:
        found["openmm"] = np.mean(traces, axis=0)
    ase = folder / "ase_langevin.npz"
    if ase.is_file():
        with np.load(ase, allow_pickle=False) as data:
            found["ase"] = data["energy"]
    return found
