"""The stage averages: reweighted averages, next to those of the training data and to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...core.samples import WeightedSamples
from ...core.statistics.estimates import largest_weight_ratio
from ...core.units import thermal_energy
from ...flows.boltzmann.generator import BoltzmannGenerator
from ...flows.boltzmann.zmatrix import build_zmatrix
from ...integrations.openmm.sampling.dynamics import Trajectory
from ...integrations.openmm.sampling.torsion_bias import torsion_angles
from ...integrations.openmm.systems.input_files import MolecularSystem
from ..stages import Done, Row, Stage, numbers
from .configuration import Workflow
from .evaluation import inside, named_torsions
from .reweight import sample_file
from .simulate import load_frames
from .train import load_generator

_ROTAMERS = {
    "gauche+": 60.0,
    "trans": 180.0,
    "gauche-": -60.0,
}  # degrees, IUPAC 1974: thirds of the circle around these


_HEAVY = 50.0  # times the mean weight; a good generator's heaviest of 100,000 samples has ten times or less


class Average(NamedTuple):
    """A reweighted average with its standard error, and the plain average over the training data."""

    name: str
    value: float
    error: float
    training: float


def averages_stage(workflow: Workflow, molecule: MolecularSystem, reference: Mapping[str, Any] | None) -> Stage:
    """Return the stage that computes averages; ``reference`` is the stored reference free energy, None without one."""

    def work(folder: Path, done: Done) -> dict[str, Any]:
        sets = [
            WeightedSamples.load(sample_file(done["reweight"], number))
            for number in range(workflow.reweight.independent_sets)
        ]
        frames, rotatable = (
            load_frames(done["simulate"]).training,
            rotatable_torsions(load_generator(done["train"]), molecule),
        )
        named = {name: molecule.torsion_atoms(atoms) for name, atoms in workflow.molecule.torsions.items()}
        warning = missing_conformation(sets, rotatable)
        return {
            "averages": [one._asdict() for one in averages(sets, frames, named or rotatable)],
            **_next_to_reference(workflow, molecule, frames, reference),
            **({} if warning is None else {"warnings": [warning]}),
        }

    inputs = {
        "torsions": {name: list(atoms) for name, atoms in workflow.molecule.torsions.items()},
        "reference": None if reference is None else {key: reference[key] for key in ("delta_f_kT", "delta_f_error_kT")},
    }
    return Stage("averages", "reweighted averages", work, inputs, needs=("reweight",), summary=_summary)


def _summary(results: Mapping[str, Any]) -> Iterator[Row]:
    yield from numbers(results)
    for one in (Average(**each) for each in results["averages"]):
        yield Row(one.name, f"{one.value:.4g} ± {one.error:.2g}", f"training data {one.training:.4g}")


def _next_to_reference(
    workflow: Workflow, molecule: MolecularSystem, frames: Trajectory, reference: Mapping[str, Any] | None
) -> dict[str, float]:
    """Return the free-energy difference in the training data and in the reference, where a run has one."""
    difference = workflow.reweight.free_energy
    if difference is None:
        return {}
    name = difference.torsion
    member = inside(named_torsions(workflow, molecule, frames.positions)[name], difference)
    results = {f"training_delta_f_{name}_kT": float(-np.log(member.mean() / (~member).mean()))}
    if reference is not None:
        results[f"reference_delta_f_{name}_kT"] = reference["delta_f_kT"]
        results[f"reference_delta_f_{name}_error_kT"] = reference["delta_f_error_kT"]
    return results


def missing_conformation(
    sets: Sequence[WeightedSamples], torsions: Mapping[str, tuple[int, int, int, int]]
) -> str | None:
    """Return a warning that says where the heaviest sample is, if it is far heavier than the others."""
    heaviest = max(sets, key=lambda one: largest_weight_ratio(one.log_weights))
    ratio = largest_weight_ratio(heaviest.log_weights)
    if ratio < _HEAVY:
        return None
    positions = heaviest.positions[np.argmax(heaviest.log_weights)]
    angles = ", ".join(f"{name} {np.degrees(torsion_angles(positions, four)):.0f}" for name, four in torsions.items())
    return (
        f"the heaviest sample has {ratio:.0f} times the mean weight: the force field populates a conformation that the flow "
        f"hardly samples, so errors are too small. Add a trajectory that starts near it, at torsions (degrees) {angles}"
    )


def averages(
    samples: Sequence[WeightedSamples], frames: Trajectory, torsions: dict[str, tuple[int, int, int, int]]
) -> list[Average]:
    """Return the mean potential energy (kJ/mol) and the population of each rotamer of each torsion.

    Args:
        samples: sets of one generator, with a reduced potential ``"target"``.
        frames: the training data.
        torsions: name to the indices of four atoms.
    """
    pooled = WeightedSamples.concatenate(list(samples)) if len(samples) > 1 else samples[0]
    kT = thermal_energy(pooled.temperature)
    # A sample without a finite energy has no weight, and its energy is nobody's.
    reduced = np.where(np.isneginf(pooled.log_weights), 0.0, pooled.reduced_potentials["target"])
    energy = pooled.average(kT * reduced)
    found = [
        Average("potential energy (kJ/mol)", float(energy.value), float(energy.error), float(frames.energies.mean()))
    ]
    for name, atoms in torsions.items():
        drawn, trained = (np.degrees(torsion_angles(x, atoms)) for x in (pooled.positions, frames.positions))
        for rotamer, centre in _ROTAMERS.items():
            population = pooled.average(_within(drawn, centre))
            found.append(
                Average(
                    f"{name} {rotamer}",
                    float(population.value),
                    float(population.error),
                    float(_within(trained, centre).mean()),
                )
            )
    return found


def rotatable_torsions(model: BoltzmannGenerator, molecule: MolecularSystem) -> dict[str, tuple[int, int, int, int]]:
    """Return the torsions that the flow found to be soft and that turn more than hydrogens, named by their atoms."""
    layout = model.coordinates.layout
    rows = [row for row in build_zmatrix(model.metadata.particles).rows if row.torsion >= 0]
    atoms = list(molecule.topology.atoms())
    found = {}
    for index in layout.circular[: len(layout.circular) - layout.rotors]:
        row = rows[index]
        four = (row.atom, row.bond, row.angle, row.torsion)
        found["-".join(f"{atoms[i].residue.name}:{atoms[i].name}" for i in four)] = four
    return found


def _within(angles: np.ndarray[Any, Any], centre: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (np.abs((angles - centre + 180.0) % 360.0 - 180.0) < 60.0).astype(np.float64)
