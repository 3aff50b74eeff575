"""ASE: samples as Atoms."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.units import nm

from ..core.samples import WeightedSamples


def atoms_from_samples(samples: WeightedSamples) -> list[Atoms]:
    """Return one ``Atoms`` per sample, in Angstrom, with the masses of the particles.

    ``atoms.info`` holds ``log_weight``, the reduced potentials (``u_target``, ...) and ``temperature`` in K;
    ``atoms.arrays`` holds ``atomtypes`` (names) and ``residuenames``, as ASE's PDB reader calls them. A
    particle without an element has ASE's symbol ``X``.
    """
    template = Atoms(numbers=samples.particles.atomic_numbers, masses=samples.particles.masses)
    template.set_array("atomtypes", np.array(samples.particles.names))
    template.set_array("residuenames", np.array(samples.particles.residue_names))
    template.info["temperature"] = samples.temperature
    frames = []
    for index, positions in enumerate(samples.positions.astype(np.float64) * nm):
        atoms = template.copy()
        atoms.positions = positions
        atoms.info["log_weight"] = float(samples.log_weights[index])
        atoms.info.update({f"u_{name}": float(u[index]) for name, u in samples.reduced_potentials.items()})
        frames.append(atoms)
    return frames
