"""Structure-based models of proteins: one bead per residue, with the native structure as energy minimum.

The alpha-carbon model of Clementi, Nymeyer and Onuchic, J. Mol. Biol. 298, 937 (2000): harmonic bonds and angles, torsions of
one and three minima, ``5 (s/r)^12 - 6 (s/r)^10`` between native contacts, repulsion between all others. It folds and unfolds in
milliseconds of computer time and its behaviour is known, so it serves as a test case for coarse-graining.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app

from ....core.errors import ConfigurationError
from ....core.potential import Particles
from ..sampling.torsion_bias import torsion_angles
from .topologies import openmm_topology, read_structure

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_BOND = 20_000.0  # of 2 K_r / epsilon, per nm^2: 100 epsilon per A^2 times (r - r0)^2
_ANGLE = 40.0  # 20 epsilon times (a - a0)^2
_SMALLEST_SEPARATION = 3  # residues between contacts


@dataclass(frozen=True)
class GoModel:
    """A structure-based model of a chain of residues.

    Attributes:
        beads: one bead per residue.
        native: positions ``(n, 3)`` in nm.
        epsilon: unit of energy, kJ/mol.
        contacts: pairs that attract each other.
        contact_strength: strength of each contact, in epsilon.
        repulsive_range: range of the repulsion between other pairs, nm.
    """

    beads: Particles
    native: FloatArray
    epsilon: float
    contacts: tuple[tuple[int, int], ...]
    contact_strength: float = 1.0
    repulsive_range: float = 0.4

    @classmethod
    def from_structure(
        cls, structure: Path, epsilon: float, contact_cutoff: float = 0.65, contact_strength: float = 1.0
    ) -> GoModel:
        """Return the model of the alpha carbons of a PDB or mmCIF file.

        Args:
            structure: file with one chain.
            epsilon: unit of energy, kJ/mol.
            contact_cutoff: nm; residues three or more apart whose alpha carbons are closer than this are in contact.
            contact_strength: strength of each contact, in epsilon.

        Raises:
            ConfigurationError: when the file is missing or has fewer than five alpha carbons, or no contact.
        """
        topology, positions = read_structure(structure)
        chosen = [atom for atom in topology.atoms() if atom.name == "CA"]
        if len(chosen) < 5:
            raise ConfigurationError(
                f"{structure} has {len(chosen)} alpha carbons (CA): a chain of at least five is needed"
            )
        native = positions[[atom.index for atom in chosen]]
        beads = Particles(
            names=("CA",) * len(chosen),
            atomic_numbers=(0,) * len(chosen),
            masses=(110.0,) * len(chosen),
            bonds=tuple((i, i + 1) for i in range(len(chosen) - 1)),
            residue_names=tuple(atom.residue.name for atom in chosen),
            residue_indices=tuple(range(len(chosen))),
        )
        apart = np.linalg.norm(native[:, None] - native[None], axis=2)
        contacts = tuple(
            (i, j)
            for i in range(len(native))
            for j in range(i + _SMALLEST_SEPARATION, len(native))
            if apart[i, j] < contact_cutoff
        )
        if not contacts:
            raise ConfigurationError(f"{structure} has no contacts within {contact_cutoff} nm: nothing would fold")
        return cls(beads, native, epsilon, contacts, contact_strength)

    def topology(self) -> app.Topology:
        """Return the OpenMM Topology of the beads."""
        return openmm_topology(self.beads)

    def system(self) -> openmm.System:
        """Return the OpenMM System."""
        system = openmm.System()
        for mass in self.beads.masses:
            system.addParticle(mass)
        for force in (self._bonds(), self._angles(), self._torsions(), self._contacts(), self._repulsion()):
            system.addForce(force)
        return system

    def _bonds(self) -> openmm.Force:
        force = openmm.HarmonicBondForce()
        for i, j in self.beads.bonds:
            force.addBond(i, j, float(np.linalg.norm(self.native[i] - self.native[j])), _BOND * self.epsilon)
        return force

    def _angles(self) -> openmm.Force:
        force = openmm.HarmonicAngleForce()
        for i in range(len(self.beads) - 2):
            first, second = self.native[i] - self.native[i + 1], self.native[i + 2] - self.native[i + 1]
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            force.addAngle(i, i + 1, i + 2, float(np.arccos(cosine)), _ANGLE * self.epsilon)
        return force

    def _torsions(self) -> openmm.Force:
        force = openmm.PeriodicTorsionForce()
        for i in range(len(self.beads) - 3):
            angle = float(torsion_angles(self.native, (i, i + 1, i + 2, i + 3)))
            # K (1 - cos n (t - t0)) is K (1 + cos(n t - phase)) with the phase n t0 + pi.
            for n, strength in ((1, 1.0), (3, 0.5)):
                force.addTorsion(i, i + 1, i + 2, i + 3, n, n * angle + np.pi, strength * self.epsilon)
        return force

    def _contacts(self) -> openmm.Force:
        lengths = {(i, j): float(np.linalg.norm(self.native[i] - self.native[j])) for i, j in self.contacts}
        return _pair_force("strength*(5*(sigma/r)^12-6*(sigma/r)^10)", self.contact_strength * self.epsilon, lengths)

    def _repulsion(self) -> openmm.Force:
        count, near = len(self.beads), set(self.contacts)
        pairs = [(i, j) for i in range(count) for j in range(i + _SMALLEST_SEPARATION + 1, count) if (i, j) not in near]
        return _pair_force("strength*(sigma/r)^12", self.epsilon, dict.fromkeys(pairs, self.repulsive_range))


def _pair_force(expression: str, strength: float, lengths: dict[tuple[int, int], float]) -> openmm.Force:
    force = openmm.CustomBondForce(expression)
    force.addPerBondParameter("strength")
    force.addPerBondParameter("sigma")
    for (i, j), sigma in lengths.items():
        force.addBond(i, j, [strength, sigma])
    return force
