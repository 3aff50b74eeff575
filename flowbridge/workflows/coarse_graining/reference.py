"""The stages reference and beads: reference frames with forces, and the positions and forces of their beads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import torch
from openmm import app, unit

from ...core.errors import ConfigurationError
from ...core.execution.executors import ProcessExecutor
from ...core.execution.progress import track
from ...core.potential import Particles
from ...core.statistics.estimates import effective_sample_percent
from ...core.units import thermal_energy
from ...forcefields.beads.force_maps import ForceMap, optimised_force_map, plain_force_map
from ...forcefields.beads.frames import BeadFrames
from ...forcefields.beads.mappings import NAMED_MAPPINGS, Mapping, identity_mapping
from ...forcefields.prior_statistics import refuse_broken
from ...integrations.mdtraj.bead_selections import mapping_from_selections
from ...integrations.mdtraj.exports import topology_from_particles
from ...integrations.mdtraj.trajectories import digest_of_file, samples_from_trajectory
from ...integrations.openmm.energies.batched import OpenMMEnergy
from ...integrations.openmm.forces.particles import particles_from_topology
from ...integrations.openmm.sampling.dynamics import LangevinRun, load_trajectory, run_all, save_arrays
from ...integrations.openmm.sampling.fourier_bias import FourierBias
from ...integrations.openmm.sampling.torsion_bias import BIAS_GROUP, MetadynamicsRun, build_bias
from ...integrations.openmm.systems.go_model import GoModel
from ...integrations.openmm.systems.input_files import MolecularSystem, load_system
from ..stages import Stage, StageFolder, write_json
from .configuration import AllAtomModel, CoarseGraining

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ReferenceModel:
    """What is coarse-grained.

    Attributes:
        particles: of the model, without solvent.
        system: OpenMM System; may have constraints, and solvent after the model's particles.
        positions: of all particles of the System, nm, to start from.
        mapping: to beads.
        native: native positions of the beads ``(n, 3)``; None where the model has none.
        molecule: all-atom model with its topology; None for beads.
    """

    particles: Particles
    system: openmm.System
    positions: FloatArray
    mapping: Mapping
    native: FloatArray | None
    molecule: MolecularSystem | None

    @property
    def constraints(self) -> list[tuple[int, int]]:
        """Pairs of the model's particles whose distance the System fixes."""
        pairs = (self.system.getConstraintParameters(n) for n in range(self.system.getNumConstraints()))
        return [(i, j) for i, j, _ in pairs if max(i, j) < len(self.particles)]

    @property
    def solvated(self) -> bool:
        """Whether the System has more particles than the model."""
        return len(self.positions) > len(self.particles)


def reference_model(settings: CoarseGraining, folder: Path) -> ReferenceModel:
    """Return what the file describes; relative paths start at ``folder``."""
    if settings.structure_based is not None:
        go = settings.structure_based
        model = GoModel.from_structure(folder / go.structure, go.epsilon, go.contact_cutoff, go.contact_strength)
        return ReferenceModel(
            model.beads, model.system(), model.native, identity_mapping(model.beads), model.native, None
        )
    all_atom = settings.all_atom
    if all_atom is None:
        raise ConfigurationError("give [all_atom] or [structure_based]")
    molecule, system, positions = _all_atom(all_atom, folder)
    atoms = particles_from_topology(molecule.topology, molecule.system)
    return ReferenceModel(atoms, system, positions, _mapping(settings, atoms), None, molecule)


def _all_atom(settings: AllAtomModel, folder: Path) -> tuple[MolecularSystem, openmm.System, FloatArray]:
    """Return the molecule alone and without constraints, and the System to simulate with its positions."""
    molecule = load_system(
        structure=settings.structure, sequence=settings.sequence, force_field=settings.force_field,
        system_file=settings.system, folder=folder,
    )  # fmt: skip
    if settings.constraints == "none" or settings.system is not None:
        return molecule, molecule.system, molecule.positions
    names = [str(folder / name) if (folder / name).is_file() else name for name in settings.force_field]
    force_field = app.ForceField(*names)
    if settings.water_box is None:
        system = force_field.createSystem(molecule.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds)
        return molecule, system, molecule.positions
    modeller = app.Modeller(molecule.topology, molecule.positions * unit.nanometer)
    modeller.addSolvent(force_field, boxSize=openmm.Vec3(*[settings.water_box] * 3) * unit.nanometer)
    system = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=settings.cutoff, constraints=app.HBonds
    )
    return molecule, system, np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)


def _relaxed(model: ReferenceModel, platform: str, folder: Path) -> FloatArray:
    """Return where runs start: as given, or relaxed where water was put in."""
    if not model.solvated:
        return model.positions
    file = folder / "relaxed.npz"
    if not file.is_file():
        chosen = openmm.Platform.getPlatformByName(platform)
        context = openmm.Context(model.system, openmm.VerletIntegrator(0.001), chosen)
        context.setPositions(model.positions)
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 500)
        state = context.getState(positions=True)
        save_arrays(file, positions=state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    with np.load(file, allow_pickle=False) as stored:
        positions: FloatArray = stored["positions"]
    return positions


def _mapping(settings: CoarseGraining, atoms: Particles) -> Mapping:
    beads = settings.beads
    if beads.name is not None:
        return NAMED_MAPPINGS[beads.name](atoms)
    topology: mdtraj.Topology = topology_from_particles(atoms)
    return mapping_from_selections(topology, beads.selections, slices=beads.slices, complete=beads.complete)


def reference_stage(settings: CoarseGraining, model: ReferenceModel, folder: Path, output: Path | None = None) -> Stage:
    """Return the stage that samples the reference, or reads its trajectories; its folder holds one file for each run.

    Args:
        settings: of the coarse-graining.
        model: from :func:`reference_model`.
        folder: where relative paths of the settings start.
        output: where the stage is kept, if runs share it.
    """
    inputs: dict[str, Any] = {
        "system": openmm.XmlSerializer.serialize(model.system),
        "positions": None if model.solvated else model.positions.tolist(),
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    if settings.trajectory is None:
        inputs["sampling"] = json.loads(settings.sampling.model_dump_json())
        return Stage(
            "reference", "reference frames", lambda stage, _: _sample(settings, model, stage), inputs, output=output
        )
    files = [folder / file for file in settings.trajectory.files]
    for file in files:
        if not file.is_file():
            raise ConfigurationError(f"the trajectory {file} does not exist")
    given = json.loads(settings.trajectory.model_dump_json(exclude={"files"}))
    inputs |= {"files": [digest_of_file(file) for file in files], "settings": given}
    return Stage(
        "reference", "reference frames from files", lambda stage, _: _read(settings, model, files, stage), inputs,
        output=output,
    )  # fmt: skip


def _sample(settings: CoarseGraining, model: ReferenceModel, folder: Path) -> dict[str, Any]:
    sampling = settings.sampling
    bias = _bias(settings, model, folder)
    system = openmm.XmlSerializer.clone(model.system)
    if bias is not None:
        bias.add_to(system)
    xml, start = openmm.XmlSerializer.serialize(system), _relaxed(model, sampling.platform, folder)
    runs = [
        LangevinRun(
            xml, start, settings.temperature, sampling.step_fs / 1000.0, sampling.friction_per_ps,
            sampling.equilibration_steps, sampling.frame_interval, sampling.frames, settings.seed * 10_007 + number,
            folder / "trajectories" / f"{number:03d}.npz", frozenset(set(range(32)) - {BIAS_GROUP}),
            len(model.particles), sampling.platform,
        )
        for number in range(sampling.runs)
    ]  # fmt: skip
    waiting = [run for run in runs if not run.file.is_file()]
    for _ in track(run_all(waiting, ProcessExecutor(settings.workers)), "reference trajectories", len(waiting)):
        continue
    steps = sampling.runs * (sampling.equilibration_steps + sampling.frames * sampling.frame_interval)
    return {
        "files": [run.file.name for run in runs],
        "frames": sampling.runs * sampling.frames,
        "nanoseconds": steps * sampling.step_fs * 1e-6,
        "bias": None if bias is None else {"torsion": bias.torsion, "cosines": bias.cosines, "sines": bias.sines},
    }


def _bias(settings: CoarseGraining, model: ReferenceModel, folder: Path) -> FourierBias | None:
    """Return the bias of the sampling, from metadynamics or from what an interrupted try has kept."""
    asked = settings.sampling.bias
    if asked is None:
        return None
    if model.molecule is None:
        raise ConfigurationError(
            "a torsion bias is for all-atom models: a structure-based one crosses its barriers by itself"
        )
    torsion = model.molecule.torsion_atoms(asked.torsion)
    file = folder / "bias.json"
    if not file.is_file():
        run = MetadynamicsRun(
            openmm.XmlSerializer.serialize(model.system), model.positions, (torsion,), settings.temperature,
            settings.sampling.step_fs / 1000.0, settings.sampling.friction_per_ps, asked.bias_factor, asked.steps,
            settings.seed, folder / "metadynamics",
        )  # fmt: skip
        bias = FourierBias.fit(torsion, build_bias(run), asked.harmonics)
        write_json(file, {"cosines": list(bias.cosines), "sines": list(bias.sines)})
    kept = json.loads(file.read_text())
    return FourierBias(torsion, tuple(kept["cosines"]), tuple(kept["sines"]))


def _read(settings: CoarseGraining, model: ReferenceModel, files: list[Path], folder: Path) -> dict[str, Any]:
    given = settings.trajectory
    names, frames = [], 0
    for number, file in enumerate(files):
        samples = samples_from_trajectory(
            file, model.particles, settings.temperature, stride=given.stride if given else 1,
            discard=given.discard if given else 0,
        )  # fmt: skip
        positions = samples.positions.astype(np.float64)
        arrays: dict[str, Any] = {"positions": positions, "log_weights": samples.log_weights}
        if model.molecule is not None and settings.training.method != "flow_matching":
            energies, forces = OpenMMEnergy(model.molecule.system, workers=settings.workers).energies_and_forces(
                positions
            )
            arrays |= {"energies": energies, "forces": forces}
        name = f"{number:03d}.npz"
        save_arrays(folder / "trajectories" / name, **arrays)
        names.append(name)
        frames += len(positions)
    return {"files": names, "frames": frames, "nanoseconds": None, "bias": None}


def beads_stage(settings: CoarseGraining, model: ReferenceModel, output: Path | None = None) -> Stage:
    """Return the stage that maps the reference frames to beads; its folder holds ``beads.npz``."""
    inputs = {
        "weights": model.mapping.weights.tolist(),
        "beads": model.mapping.beads.to_dict(),
        "force_map": settings.beads.force_map,
    }
    return Stage(
        "beads", "positions and forces of the beads",
        lambda folder, done: _map(settings, model, done["reference"], folder), inputs, needs=("reference",), output=output,
    )  # fmt: skip


def mapped_reference(
    settings: CoarseGraining, model: ReferenceModel, folder: Path, output: Path
) -> dict[str, StageFolder]:
    """Do the stages ``reference`` and ``beads`` alone, or find them done, and return them by name."""
    done: dict[str, StageFolder] = {}
    for stage in (reference_stage(settings, model, folder), beads_stage(settings, model)):
        done[stage.name] = stage.completed(output, done)
    return done


def _map(settings: CoarseGraining, model: ReferenceModel, reference: StageFolder, folder: Path) -> dict[str, Any]:
    found = reference.results or {}
    bias = (
        None
        if found["bias"] is None
        else FourierBias(*(tuple(found["bias"][key]) for key in ("torsion", "cosines", "sines")))
    )
    force_map: ForceMap | None = None
    positions, forces, log_weights = [], [], []
    plain_noise = optimised_noise = math.nan
    for name in found["files"]:
        file = reference.folder / "trajectories" / name
        frames, given, weights = _frames(file, bias, settings.temperature)
        positions.append(model.mapping.positions(frames))
        refuse_broken(model.mapping.beads, positions[-1])
        log_weights.append(weights)
        if given is None:
            continue
        if force_map is None:
            plain = plain_force_map(model.mapping, model.constraints)
            optimal = settings.beads.force_map == "optimised"
            force_map = optimised_force_map(model.mapping, given, model.constraints) if optimal else plain
            plain_noise, optimised_noise = (
                float(np.square(one.forces(given)).mean() ** 0.5) for one in (plain, force_map)
            )
        forces.append(force_map.forces(given))
    arrays = {"positions": np.concatenate(positions), "log_weights": np.concatenate(log_weights)}
    if forces:
        arrays["forces"] = np.concatenate(forces)
    save_arrays(folder / "beads.npz", **arrays)
    return {
        "beads": len(model.mapping.beads),
        "frames_of_runs": [len(one) for one in positions],
        "effective_percent": effective_sample_percent(arrays["log_weights"]),
        "force_map": settings.beads.force_map if forces else None,
        "root_mean_square_force_plain": plain_noise if forces else None,
        "root_mean_square_force": optimised_noise if forces else None,
    }


def _frames(
    file: Path, bias: FourierBias | None, temperature: float
) -> tuple[FloatArray, FloatArray | None, FloatArray]:
    """Return positions, forces where there are any, and log-weights of a run."""
    with np.load(file, allow_pickle=False) as data:
        if "forces" not in data:
            return data["positions"], None, data["log_weights"]
        if "log_weights" in data:
            return data["positions"], data["forces"], data["log_weights"]
    frames = load_trajectory(file)
    weights = (
        np.zeros(len(frames.positions))
        if bias is None
        else bias.energies(frames.positions) / thermal_energy(temperature)
    )
    return frames.positions, frames.forces, weights


@dataclass(frozen=True)
class BeadData:
    """Bead frames of all runs, with log-weights ``(F,)``."""

    frames: BeadFrames
    log_weights: FloatArray
    runs: list[int]


def load_beads(stage: StageFolder) -> BeadData:
    """Return what the stage ``beads`` kept."""
    with np.load(stage.folder / "beads.npz", allow_pickle=False) as data:
        log_weights = data["log_weights"]
        weights = None
        if np.ptp(log_weights) > 0.0:
            weights = torch.from_numpy(np.exp(log_weights - log_weights.max()))
        forces = torch.from_numpy(data["forces"]) if "forces" in data else None
        frames = BeadFrames(torch.from_numpy(data["positions"]), forces, weights)
    return BeadData(frames, log_weights, (stage.results or {})["frames_of_runs"])
