"""The stage analysis: the simulated force field against the reference it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
from numpy.typing import NDArray
from openmm import app, unit

from ...core.errors import ConfigurationError
from ...core.statistics.bootstrap import Estimate
from ...core.statistics.estimates import free_energy_difference
from ...core.statistics.free_energy_surfaces import Surface, compare_surfaces
from ...forcefields.beads.native_contacts import NativeContacts, contact_map, transitions
from ...integrations.deeptime import SlowCoordinates
from ...integrations.mdtraj.exports import topology_from_particles
from ...integrations.mdtraj.trajectories import digest_of_file
from ...integrations.openmm.sampling.torsion_bias import torsion_angles
from ..stages import Done, Stage, Written
from .configuration import CoarseGraining
from .figures import draw_figures
from .findings import Findings, SurfacePair
from .reference import BeadData, ReferenceModel, load_beads

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_CONTACT_BINS = 25
_SLOW_BINS = 30
_LOW, _HIGH = 0.25, 0.75  # fractions of native contacts that a transition goes between


def analysis_stage(settings: CoarseGraining, model: ReferenceModel, folder: Path) -> Stage:
    """Return the stage that compares, and draws figures into its folder; relative paths start at ``folder``."""

    def work(stage: Path, done: Done) -> dict[str, Any]:
        with np.load(done["dynamics"].folder / "frames.npz", allow_pickle=False) as stored:
            frames = stored["positions"]
        found = analyse(settings, model, folder, load_beads(done["beads"]), frames)
        draw_figures(found, done["train"].results or {}, stage / "figures")
        return found.numbers

    native = settings.analysis.native_structure
    if native is not None and not (folder / native).is_file():
        raise ConfigurationError(f"the native structure {folder / native} does not exist")
    inputs = {
        "analysis": json.loads(settings.analysis.model_dump_json(exclude={"native_structure"})),
        "native_structure": None if native is None else digest_of_file(folder / native),
    }
    return Stage(
        "analysis", "comparison with the reference", work, inputs, ("dynamics",), (Written("figures", "figures"),)
    )


def analyse(
    settings: CoarseGraining, model: ReferenceModel, folder: Path, data: BeadData, frames: NDArray[Any]
) -> Findings:
    """Compare coarse-grained frames ``(F, R, n, 3)`` with the reference frames of the beads."""
    found = Findings()
    reference = data.frames.positions.numpy()
    # Replica after replica: blocks of the bootstrap are then replicas, which are independent.
    coarse = np.ascontiguousarray(np.swapaxes(frames, 0, 1)).reshape(-1, *frames.shape[2:])
    if settings.analysis.torsions:
        _torsions(settings, found, reference, coarse, data.log_weights, frames.shape[1])
    native = _native(settings, model, folder)
    if settings.analysis.contact_cutoff is not None:
        if native is None:
            raise ConfigurationError("native contacts need [analysis] native_structure: a PDB file of the beads")
        _contacts(settings, found, native, reference, frames, data.log_weights)
        _deviations(found, model, native, reference, coarse, data.log_weights)
    if settings.analysis.slow_lag:
        _slow(settings, found, reference, coarse, data, frames.shape[1])
    return found


def _torsions(
    settings: CoarseGraining,
    found: Findings,
    reference: FloatArray,
    coarse: FloatArray,
    log_weights: FloatArray,
    blocks: int,
) -> None:
    named = settings.analysis.torsions
    edges = [np.linspace(-np.pi, np.pi, settings.analysis.bins + 1)] * len(named)

    def angles(positions: FloatArray) -> FloatArray:
        return np.stack([torsion_angles(positions, four) for four in named.values()], axis=1)

    _compare(
        found, "torsions", tuple(named), Surface.of(angles(reference), edges, log_weights),
        Surface.of(angles(coarse), edges, blocks=max(blocks, 2)),
    )  # fmt: skip


def _compare(found: Findings, key: str, names: tuple[str, ...], reference: Surface, coarse: Surface) -> None:
    compared = compare_surfaces(coarse, reference)
    found.surfaces[key] = SurfacePair(names, reference, coarse)
    found.numbers |= {
        f"{key}_jensen_shannon": compared.divergence.value,
        f"{key}_jensen_shannon_error": compared.divergence.error,
        f"{key}_mean_square_free_energy_error": compared.mean_square_error.value,
        f"{key}_mean_square_free_energy_error_error": compared.mean_square_error.error,
    }


def _native(settings: CoarseGraining, model: ReferenceModel, folder: Path) -> FloatArray | None:
    if model.native is not None:
        return model.native
    given = settings.analysis.native_structure
    if given is None:
        return None
    positions = app.PDBFile(str(folder / given)).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    array = np.array(positions, dtype=np.float64)
    if len(array) == len(model.particles):
        return model.mapping.positions(array[None])[0]
    if len(array) != len(model.mapping.beads):
        raise ConfigurationError(f"{given} has {len(array)} atoms, which are neither the molecule's nor the beads")
    return array


def _contacts(
    settings: CoarseGraining,
    found: Findings,
    native: FloatArray,
    reference: FloatArray,
    frames: NDArray[Any],
    log_weights: FloatArray,
) -> None:
    cutoff = settings.analysis.contact_cutoff or 0.0
    contacts = NativeContacts.of(native, cutoff)
    replicas = frames.shape[1]
    series = np.stack([contacts.fraction(frames[:, replica]) for replica in range(replicas)])
    expected, seen = contacts.fraction(reference), series.ravel()
    edges = [np.linspace(0.0, 1.0, _CONTACT_BINS + 1)]
    _compare(
        found, "native_contacts", ("fraction of native contacts",), Surface.of(expected[:, None], edges, log_weights),
        Surface.of(seen[:, None], edges, blocks=max(replicas, 2)),
    )  # fmt: skip
    found.contact_series = series
    found.contact_maps = contact_map(reference, cutoff), contact_map(frames.reshape(-1, *frames.shape[2:]), cutoff)
    folded = settings.analysis.folded
    pair: list[Estimate[float]] = []
    for name, values, weights, blocks in (
        ("reference", expected, log_weights, None),
        ("coarse", seen, np.zeros(len(seen)), max(replicas, 2)),
    ):
        one = free_energy_difference(values < folded, values >= folded, weights, blocks=blocks)
        found.numbers |= {
            f"folding_free_energy_{name}_kt": one.value,
            f"folding_free_energy_{name}_error_kt": one.error,
        }
        pair.append(one)
    found.numbers["folding_free_energy_difference_kt"] = pair[1].value - pair[0].value
    found.numbers["folding_transitions"] = sum(transitions(one, _LOW, _HIGH) for one in series)


def _deviations(
    found: Findings,
    model: ReferenceModel,
    native: FloatArray,
    reference: FloatArray,
    coarse: FloatArray,
    log_weights: FloatArray,
) -> None:
    topology = topology_from_particles(model.mapping.beads)
    native_frame = mdtraj.Trajectory(native[None].astype(np.float32), topology)
    weights = np.exp(log_weights - log_weights.max())
    for name, positions, share in (("reference", reference, weights), ("coarse", coarse, np.ones(len(coarse)))):
        values = mdtraj.rmsd(mdtraj.Trajectory(positions.astype(np.float32), topology), native_frame)
        found.numbers[f"mean_deviation_from_native_{name}_nm"] = float(np.average(values, weights=share))


def _slow(
    settings: CoarseGraining, found: Findings, reference: FloatArray, coarse: FloatArray, data: BeadData, blocks: int
) -> None:
    if np.ptp(data.log_weights) > 0.0:
        raise ConfigurationError("slow coordinates need unbiased trajectories: leave out [sampling.bias], or slow_lag")
    ends = np.cumsum(data.runs)
    runs = [reference[end - count : end] for end, count in zip(ends, data.runs, strict=True)]
    slow = SlowCoordinates.fit(runs, settings.analysis.slow_lag)
    expected, seen = slow(reference), slow(coarse)
    edges = [
        np.linspace(low, high, _SLOW_BINS + 1)
        for low, high in zip(expected.min(0) - 0.5, expected.max(0) + 0.5, strict=True)
    ]
    inside = np.clip(seen, [one[0] for one in edges], [one[-1] for one in edges])
    _compare(
        found, "slow_coordinates", ("slow coordinate 1", "slow coordinate 2")[: len(edges)],
        Surface.of(expected, edges), Surface.of(inside, edges, blocks=max(blocks, 2)),
    )  # fmt: skip
    found.numbers["slow_timescales_frames"] = [float(value) for value in slow.timescales]
