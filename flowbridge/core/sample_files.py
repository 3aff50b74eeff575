"""Files of weighted samples: HDF5 that mdtraj opens as a trajectory, with everything else in a group of ours.

Layout::

    bytes 0-511            user block: format, version, SHA-256 and length of all that follows
    /coordinates           (S, N, 3) float32 nm         mdtraj's convention "Pande" 1.1
    /topology              (1,) bytes, JSON             mdtraj's topology
    /flowbridge/header     (1,) bytes, JSON             particles, temperature, provenance, potential names
    /flowbridge/log_weights                   (S,) float64
    /flowbridge/reduced_potentials/0, 1, ...  (S,) float64, in the order of the names
    /flowbridge/positions  (S, N, 3) float64 nm         only where the samples were in double precision

HDF5 skips a user block, so mdtraj, PyTables and h5py open the file as any other. The library itself must not
see a damaged file: it has been found to loop without end on one flipped bit of its metadata. Therefore the block
is checked before the file is opened as HDF5.
"""

from __future__ import annotations

import hashlib
import json
import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from .errors import FlowbridgeError
from .potential import Particles

if TYPE_CHECKING:
    from .samples import WeightedSamples

FORMAT = b"flowbridge weighted samples\n"
FORMAT_VERSION = 1
BLOCK_SIZE = 512
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TRAJECTORY_CONVENTIONS = {"conventions": "Pande", "conventionVersion": "1.1", "program": "MDTraj"}

# Hydrogen to oganesson, by atomic number; mdtraj's "VS" (virtual site) stands for beads, number 0.
ELEMENT_SYMBOLS = (
    "VS", "H", "He", "Li", "Be", "B", "C", "N", "O", "F", "Ne", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar",
    "K", "Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr",
    "Rb", "Sr", "Y", "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe",
    "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu",
    "Hf", "Ta", "W", "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn",
    "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No", "Lr",
    "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og",
)  # fmt: skip


class SampleFileError(FlowbridgeError, ValueError):
    """A file of samples is truncated, altered, foreign, or too new."""


def topology_json(particles: Particles) -> str:
    """Return mdtraj's JSON of a topology: one chain, a residue a run of particles of the same residue."""
    residues: list[dict[str, Any]] = []
    keys = zip(particles.residue_indices, particles.residue_names, strict=True)
    for (number, name), run in groupby(enumerate(keys), key=lambda item: item[1]):
        atoms = [
            {"index": i, "name": particles.names[i], "element": ELEMENT_SYMBOLS[particles.atomic_numbers[i]]}
            for i, _ in run
        ]
        residues.append({"index": len(residues), "name": name, "resSeq": number + 1, "segmentID": "", "atoms": atoms})
    chain = {"index": 0, "residues": residues}
    return json.dumps({"chains": [chain], "bonds": [list(bond) for bond in particles.bonds]})


def _user_block(path: Path) -> bytes:
    """Return the user block that belongs to what follows it in the file at ``path``."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(BLOCK_SIZE)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    text = FORMAT + f"version {FORMAT_VERSION}\nsha256 {digest}\nbytes {length}\n".encode()
    return text.ljust(BLOCK_SIZE - 1) + b"\n"


def _write(file: h5py.File, samples: WeightedSamples) -> None:
    header = {
        "particles": samples.particles.to_dict(),
        "temperature": samples.temperature,
        "provenance": dict(samples.provenance),
        "reduced_potentials": list(samples.reduced_potentials),
    }
    for name, value in TRAJECTORY_CONVENTIONS.items():
        file.attrs[name] = value
    file.attrs["application"] = "flowbridge"
    file.create_dataset("topology", data=np.array([topology_json(samples.particles).encode()]))
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    coordinates = file.create_dataset("coordinates", data=samples.positions.astype(np.float32), **options)
    coordinates.attrs["units"] = "nanometers"
    group = file.create_group("flowbridge")
    group.create_dataset("header", data=np.array([json.dumps(header).encode()]))
    group.create_dataset("log_weights", data=samples.log_weights)
    for index, values in enumerate(samples.reduced_potentials.values()):
        group.create_dataset(f"reduced_potentials/{index}", data=values)
    if samples.positions.dtype == np.float64:
        group.create_dataset("positions", data=samples.positions, **options)


def write_samples(samples: WeightedSamples, path: Path) -> None:
    """Write samples to ``path``; a file already there is replaced only when the new one is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with h5py.File(partial, "w", userblock_size=BLOCK_SIZE) as file:
            _write(file, samples)
        block = _user_block(partial)
        with partial.open("r+b") as raw:
            raw.write(block)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _require_intact(path: Path) -> None:
    with path.open("rb") as file:
        block = file.read(BLOCK_SIZE)
    if block.startswith(HDF5_SIGNATURE):
        raise SampleFileError(
            f"{path} is HDF5, but holds no weighted samples of flowbridge; if it is a trajectory, open it with mdtraj"
        )
    if not block.startswith(FORMAT):
        raise SampleFileError(f"{path} is no file of weighted samples: it does not begin as one")
    if block == _user_block(path):
        return
    version = block[len(FORMAT) :].partition(b"\n")[0].removeprefix(b"version ")
    if version.isdigit() and int(version) > FORMAT_VERSION:
        raise SampleFileError(
            f"{path} has format version {int(version)}, this flowbridge reads up to {FORMAT_VERSION}: update flowbridge"
        )
    raise SampleFileError(f"{path} does not match its digest: it was truncated, altered or damaged")


def read_samples(path: Path) -> dict[str, Any]:
    """Return what a file of :func:`write_samples` holds, by the names of the fields of the samples.

    Raises:
        FileNotFoundError: when there is no such file.
        SampleFileError: when it is truncated, altered, foreign, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of samples at {path}")
    _require_intact(path)
    with h5py.File(path, "r") as file:
        group = file["flowbridge"]
        header = json.loads(bytes(group["header"][0]))
        return {
            "positions": group["positions"][:] if "positions" in group else file["coordinates"][:],
            "log_weights": group["log_weights"][:],
            "reduced_potentials": {
                name: group[f"reduced_potentials/{index}"][:] for index, name in enumerate(header["reduced_potentials"])
            },
            "particles": Particles.from_dict(header["particles"]),
            "temperature": header["temperature"],
            "provenance": header["provenance"],
        }
