"""OpenMM topologies and positions: from structure files, from atoms and bonds, from flowbridge's particles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app, unit

from ....core.errors import ConfigurationError
from ....core.potential import Particles

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def read_structure(path: Path) -> tuple[app.Topology, FloatArray]:
    """Return topology and positions ``(N, 3)`` nm of a PDB or mmCIF file.

    Raises:
        ConfigurationError: when the file is missing or cannot be read.
    """
    if not path.is_file():
        raise ConfigurationError(f"the structure file {path} does not exist")
    reader = app.PDBxFile if path.suffix.lower() in (".cif", ".mmcif") else app.PDBFile
    try:
        file = reader(str(path))
    except Exception as error:
        raise ConfigurationError(f"OpenMM cannot read {path}: {error}") from error
    return file.topology, np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)


def molecule_topology(
    symbols: Sequence[str], bonds: Iterable[tuple[int, int]], residue: str = "MOL", names: Sequence[str] | None = None
) -> app.Topology:
    """Return the topology of one molecule as one residue.

    Args:
        symbols: chemical symbols.
        bonds: pairs of indices.
        residue: name of the residue.
        names: names of the atoms; symbol and number, such as O1, H1, H2, where None.
    """
    topology = app.Topology()
    only = topology.addResidue(residue, topology.addChain())
    counts: Counter[str] = Counter()
    atoms = []
    for index, symbol in enumerate(symbols):
        counts[symbol] += 1
        name = f"{symbol}{counts[symbol]}" if names is None else names[index]
        atoms.append(topology.addAtom(name, app.Element.getBySymbol(symbol), only))
    for first, second in bonds:
        topology.addBond(atoms[first], atoms[second])
    return topology


def openmm_topology(particles: Particles) -> app.Topology:
    """Return the topology of particles: one chain, with residues and bonds; beads have no element."""
    topology = app.Topology()
    chain = topology.addChain()
    atoms: list[app.topology.Atom] = []
    last: tuple[int, str] | None = None
    for index, name in enumerate(particles.names):
        key = (particles.residue_indices[index], particles.residue_names[index])
        if key != last:
            residue = topology.addResidue(key[1], chain, id=str(key[0] + 1))
            last = key
        number = particles.atomic_numbers[index]
        atoms.append(topology.addAtom(name, app.Element.getByAtomicNumber(number) if number else None, residue))
    for i, j in particles.bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology
