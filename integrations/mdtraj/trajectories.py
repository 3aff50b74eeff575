"""Samples from and to trajectory files of simulations and analysis tools.

``.traj`` and ``.extxyz`` go through ASE, ``.h5`` of :meth:`WeightedSamples.save` through flowbridge, all others (DCD, XTC, TRR,
NetCDF, PDB, HDF5 of mdtraj or of its reporter for OpenMM ...) through mdtraj.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import h5py
import mdtraj
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kJ, mol, nm
from mdtraj.formats.registry import FormatRegistry
from openmm import app

from ...core.errors import ConfigurationError, MoleculeMismatchError
from ...core.potential import Particles
from ...core.sample_files import SampleFileError
from ...core.samples import WeightedSamples
from ...core.units import thermal_energy
from ..ase import atoms_from_samples
from ..openmm.forces.particles import particles_from_topology
from ..openmm.sampling.dynamics import save_arrays
from ..openmm.systems.topologies import read_structure
from .exports import topology_from_particles, trajectory_from_samples

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
PathLike = str | os.PathLike[str]

_ASE = {".traj", ".extxyz"}
_WEIGHTS = ".weights.npz"
_BROKEN = 2.5  # times the shortest length of a bond: a jump across a box is longer, a vibration is not


class _Content(NamedTuple):
    """Positions ``(F, N, 3)`` nm, log-weights ``(F,)``, reduced potentials and provenance of one file."""

    positions: np.ndarray[Any, Any]
    log_weights: FloatArray
    reduced_potentials: dict[str, FloatArray]
    provenance: dict[str, Any]


def samples_from_trajectory(
    files: PathLike | Sequence[PathLike],
    topology: PathLike | app.Topology | Particles,
    temperature: float,
    *,
    stride: int = 1,
    discard: int = 0,
) -> WeightedSamples:
    """Return the frames of trajectory files as samples of one ensemble.

    Frames have equal weights, as in a simulation, unless :func:`write_trajectory` wrote the files: then weights and reduced
    potentials are restored. Energies that ASE stored with frames become the reduced potential ``"trajectory"``.
    XTC holds positions rounded to 0.001 nm, the other formats float32 at least; energies of a stiff molecule change by several
    kJ/mol from the rounding of XTC.

    Args:
        files: one or more trajectories of the same molecule, in any of the formats above.
        topology: PDB or mmCIF file, OpenMM Topology, or particles, in the order of the trajectory.
        temperature: temperature of the ensemble, K.
        stride: interval of the frames to take.
        discard: number of frames to omit at the beginning of each file.

    Raises:
        ConfigurationError: for files that are missing, unreadable or shorter than ``discard``, or temperatures that differ.
        MoleculeMismatchError: when number or elements of the atoms differ, or a molecule is broken across a periodic box.
        SampleFileError: when weights were stored for another trajectory than the one next to them.
        ValueError: when positions are NaN or infinite.
    """
    particles = _particles(topology)
    paths = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not paths:
        raise ConfigurationError("no trajectory files were given")
    if stride < 1 or discard < 0:
        raise ConfigurationError(f"stride must be at least 1 and discard at least 0, got {stride} and {discard}")
    parts = []
    for path in paths:
        content = _read(path, particles, temperature)
        if len(content.positions) <= discard:
            raise ConfigurationError(
                f"{path} has {len(content.positions)} frames, of which {discard} are to be discarded"
            )
        _require_whole(content.positions, particles, path)
        part = WeightedSamples(
            content.positions,
            content.log_weights,
            particles,
            temperature,
            content.reduced_potentials,
            content.provenance,
        )
        parts.append(part.subset(slice(discard, None, stride)))
    return WeightedSamples.concatenate(parts) if len(parts) > 1 else parts[0]


def write_trajectory(samples: WeightedSamples, path: PathLike, *, topology: PathLike | None = None) -> None:
    """Write samples to a trajectory file, in the format of its ending, with their weights.

    HDF5 holds everything in one file. ASE's formats hold log-weights, reduced potentials and, where the samples have a
    reduced potential ``"target"``, its energy in ``Atoms``. Next to any other format, ``NAME.weights.npz`` holds arrays
    ``log_weights``, ``u_target`` and so on, one value per frame. The weights are those of the positions before rounding.

    Args:
        samples: samples to write.
        path: path of the trajectory; it and the weights appear complete or not at all.
        topology: path of a PDB file of the first frame, which formats without atom names need for reading.

    Raises:
        ConfigurationError: for an ending that neither mdtraj nor ASE writes.
    """
    path = Path(path)
    if topology is not None:
        _replacing(Path(topology), trajectory_from_samples(samples.subset(slice(0, 1))).save_pdb)
    if path.suffix == ".h5":
        samples.save(path)
    elif path.suffix in _ASE:
        _replacing(path, lambda file: ase.io.write(file, _atoms_with_energies(samples)))
    elif path.suffix in FormatRegistry.fileobjects:
        _replacing(path, trajectory_from_samples(samples).save)
        _write_weights(samples, path)
    else:
        raise ConfigurationError(
            f"nothing here writes {path.suffix or 'files without an ending'}: use .h5, .dcd, .xtc, .traj or another ending "
            "that mdtraj knows"
        )


def _particles(topology: PathLike | app.Topology | Particles) -> Particles:
    if isinstance(topology, Particles):
        return topology
    if isinstance(topology, app.Topology):
        return particles_from_topology(topology)
    try:
        return particles_from_topology(read_structure(Path(topology))[0])
    except ConfigurationError as error:
        raise ConfigurationError(f"no topology can be read from {topology}: {error}") from error


def _read(path: Path, particles: Particles, temperature: float) -> _Content:
    if not path.is_file():
        raise ConfigurationError(f"the trajectory {path} does not exist")
    digest = digest_of_file(path)
    try:
        if path.suffix == ".h5" and _of_flowbridge(path):
            return _read_own(path, particles, temperature)
        content = _read_ase(path, particles, temperature) if path.suffix in _ASE else _read_mdtraj(path, particles)
    except (ConfigurationError, MoleculeMismatchError, SampleFileError):
        raise
    except Exception as error:
        raise ConfigurationError(f"the trajectory {path} cannot be read: {error}") from error
    content = content._replace(provenance={"trajectory": path.name, "sha256": digest})
    weights = path.with_name(path.name + _WEIGHTS)
    return _with_weights(content, weights, digest, temperature) if weights.is_file() else content


def _read_mdtraj(path: Path, particles: Particles) -> _Content:
    own_topology = path.suffix in (".h5", ".pdb", ".cif")
    try:
        known = {} if own_topology else {"top": topology_from_particles(particles)}
        trajectory = mdtraj.load(str(path), **known)
    except ValueError as error:
        raise MoleculeMismatchError(
            f"the frames of {path} are not those of {len(particles)} particles: {error}"
        ) from error
    if own_topology:
        numbers = [0 if atom.element is None else int(atom.element.atomic_number) for atom in trajectory.topology.atoms]
        _require_elements(numbers, particles, path)
    return _Content(trajectory.xyz, np.zeros(len(trajectory)), {}, {})


def _read_ase(path: Path, particles: Particles, temperature: float) -> _Content:
    frames: list[Any] = list(ase.io.read(path, index=":"))
    for atoms in frames:
        _require_elements(atoms.numbers.tolist(), particles, path)
    positions = np.stack([atoms.positions for atoms in frames]) / nm
    stored = frames[0].info.get("temperature", temperature)
    _require_temperature(float(stored), temperature, path)
    log_weights = np.array([atoms.info.get("log_weight", 0.0) for atoms in frames])
    names = sorted(name for name in frames[0].info if name.startswith("u_"))
    potentials = {name[2:]: np.array([atoms.info[name] for atoms in frames]) for name in names}
    if "target" not in potentials and all(atoms.calc and "energy" in atoms.calc.results for atoms in frames):
        energies = np.array([atoms.get_potential_energy() for atoms in frames]) / (kJ / mol)
        potentials["trajectory"] = energies / thermal_energy(temperature)
    return _Content(positions, log_weights, potentials, {})


def _of_flowbridge(path: Path) -> bool:
    with h5py.File(path) as file:
        return "flowbridge" in file


def _read_own(path: Path, particles: Particles, temperature: float) -> _Content:
    samples = WeightedSamples.load(path)
    _require_elements(list(samples.particles.atomic_numbers), particles, path)
    _require_temperature(samples.temperature, temperature, path)
    return _Content(samples.positions, samples.log_weights, dict(samples.reduced_potentials), dict(samples.provenance))


def _require_elements(numbers: list[int], particles: Particles, path: Path) -> None:
    expected = list(particles.atomic_numbers)
    if len(numbers) != len(expected):
        raise MoleculeMismatchError(f"{path} has {len(numbers)} atoms, the topology {len(expected)}")
    for index, (found, wanted) in enumerate(zip(numbers, expected, strict=True)):
        if found != wanted:
            raise MoleculeMismatchError(
                f"atom {index} of {path} has the atomic number {found}, that of the topology ({particles.names[index]}) "
                f"{wanted}: the order of the atoms must be the same"
            )


def _require_temperature(found: float, given: float, path: Path) -> None:
    if abs(found - given) > 1e-6 * given:
        raise ConfigurationError(f"the samples in {path} are at {found:g} K, not at {given:g} K as given")


def _require_whole(positions: np.ndarray[Any, Any], particles: Particles, path: Path) -> None:
    """Refuse molecules that are broken across a periodic box, in some frames or in all."""
    if not particles.bonds:
        return
    first, second = np.array(particles.bonds).T
    lengths = np.linalg.norm(positions[:, first] - positions[:, second], axis=2)
    # A molecule may be cut in every frame: no bond of atoms is longer than 0.3 nm, but those of beads are.
    typical = np.minimum(lengths.min(axis=0), np.median(lengths) * 2.0)
    broken = lengths > _BROKEN * typical
    if broken.any():
        frame, bond = np.argwhere(broken)[0]
        i, j = particles.bonds[bond]
        raise MoleculeMismatchError(
            f"in {int(broken.any(axis=1).sum())} of {len(positions)} frames of {path} the molecule is broken: in frame {frame} "
            f"{particles.names[i]} and {particles.names[j]} (atoms {i} and {j}), which are bonded, are "
            f"{lengths[frame, bond]:.3f} nm apart. Make molecules whole first, say by mdtraj's make_molecules_whole()"
        )


def _atoms_with_energies(samples: WeightedSamples) -> list[Any]:
    frames = atoms_from_samples(samples)
    if "target" in samples.reduced_potentials:
        energies = samples.reduced_potentials["target"] * thermal_energy(samples.temperature) * kJ / mol
        for atoms, energy in zip(frames, energies, strict=True):
            atoms.calc = SinglePointCalculator(atoms, energy=float(energy))
    return frames


def _write_weights(samples: WeightedSamples, path: Path) -> None:
    content = {f"u_{name}": values for name, values in samples.reduced_potentials.items()}
    about = {"temperature": samples.temperature, "sha256": digest_of_file(path), "provenance": dict(samples.provenance)}

    about_array = np.array(json.dumps(about))
    save_arrays(path.with_name(path.name + _WEIGHTS), log_weights=samples.log_weights, about=about_array, **content)


def _with_weights(content: _Content, file: Path, digest: str, temperature: float) -> _Content:
    with np.load(file, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        if about["sha256"] != digest:
            raise SampleFileError(
                f"{file} holds weights of another trajectory than the one next to it, which was changed since: write both "
                "again, or remove the weights to count all frames equally"
            )
        _require_temperature(about["temperature"], temperature, file)
        potentials = {name[2:]: stored[name] for name in stored.files if name.startswith("u_")}
        return content._replace(
            log_weights=stored["log_weights"], reduced_potentials=potentials, provenance=about["provenance"]
        )


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replacing(path: Path, write: Any) -> None:
    """Let ``write`` fill a temporary file of the same ending, and rename it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
