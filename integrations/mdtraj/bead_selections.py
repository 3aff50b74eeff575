"""Beads chosen in mdtraj's selection language, and PDB files of beads."""

from __future__ import annotations

import os
from collections.abc import Mapping as MappingOf
from pathlib import Path

import mdtraj
import numpy as np
from numpy.typing import ArrayLike

from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ...forcefields.beads.mappings import Mapping, centre_of_mass_mapping, slice_mapping
from .exports import particles_from_mdtraj, topology_from_particles


def mapping_from_selections(
    topology: mdtraj.Topology, beads: MappingOf[str, str], *, slices: bool = False, complete: bool = False
) -> Mapping:
    """Return a mapping whose beads are selections of atoms.

    Args:
        topology: topology of the atoms, with bonds.
        beads: name and selection of each bead, in mdtraj's language, such as ``{"BB": "resid 1 and backbone"}``.
        slices: whether each selection is one atom at the bead's position; otherwise beads are centres of mass.
        complete: whether to refuse selections that leave atoms out (centres of mass only).

    Raises:
        ConfigurationError: for selections that mdtraj cannot read, that match nothing, or overlap.
    """
    atoms = particles_from_mdtraj(topology)
    groups = [_selected(topology, name, selection) for name, selection in beads.items()]
    if not slices:
        return centre_of_mass_mapping(atoms, groups, list(beads), complete=complete)
    for (name, selection), group in zip(beads.items(), groups, strict=True):
        if len(group) != 1:
            raise ConfigurationError(
                f"bead {name!r} is to be one atom, but {selection!r} selects {len(group)}: narrow it down, or take "
                "centres of mass"
            )
    return slice_mapping(atoms, [group[0] for group in groups], list(beads))


def _selected(topology: mdtraj.Topology, name: str, selection: str) -> list[int]:
    try:
        found = topology.select(selection)
    except Exception as error:  # mdtraj raises errors of any type
        raise ConfigurationError(f"mdtraj cannot read the selection {selection!r} of bead {name!r}: {error}") from error
    if not len(found):
        raise ConfigurationError(f"the selection {selection!r} of bead {name!r} matches no atom")
    return [int(index) for index in found]


def write_bead_pdb(beads: Particles, positions: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write beads to a PDB file with CONECT records; several frames become models.

    Args:
        beads: names, residues and bonds.
        positions: ``(n, 3)`` or ``(F, n, 3)`` in nm.
        path: path of the file.
    """
    array = np.asarray(positions, dtype=np.float32)
    frames = array[None] if array.ndim == 2 else array
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    mdtraj.Trajectory(frames, topology_from_particles(beads)).save_pdb(str(path))
