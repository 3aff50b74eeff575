"""Structure-based models of proteins: one bead a residue, and a native structure at the bottom of the energy.

The alpha-carbon model of Clementi, Nymeyer and Onuchic, J. Mol. Biol. 298, 937 (2000): harmonic bonds and angles, torsions of
one and three minima, ``5 (s/r)^12 - 6 (s/r)^10`` between native contacts, repulsion between all others. It folds and unfolds in
milliseconds of computer time, and what it does is known: a test case for coarse-graining that is always there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError
from ....core.potential import Particles
from ...mdtraj.bead_selections import openmm_topology
from ..sampling.torsion_bias import torsion_angles

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_BOND = 20_000.0  # of 2 K_r / epsilon, per nm^2: 100 epsilon per A^2 times (r - r0)^2
_ANGLE = 40.0  # 20 epsilon times (a - a0)^2
_SMALLEST_SEPARATION = 3  # residues between contacts


@dataclass(frozen=True)
class GoModel:
    """A structure-based model of a chain of residues.

    Attributes:
        beads: one a residue.
        native: positions ``(n, 3)`` in nm.
        epsilon: kJ/mol, the unit of the energy.
        contacts: pairs that attract each other.
        contact_strength: of each contact, in epsilon.
        repulsive_range: nm, of pairs that are no contacts.
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
            structure: the file; one chain.
            epsilon: kJ/mol.
            contact_cutoff: nm; residues three or more apart whose alpha carbons are closer than this are in contact.
            contact_strength: of each contact, in epsilon.

        Raises:
            ConfigurationError: when the file is missing or has fewer than five alpha carbons, or no contact.
        """
        if not structure.is_file():
            raise ConfigurationError(f"the structure file {structure} does not exist")
        reader = app.PDBxFile if structure.suffix.lower() in (".cif", ".mmcif") else app.PDBFile
        file = reader(str(structure))
        chosen = [atom for atom in file.topology.atoms() if atom.name == "CA"]
        if len(chosen) < 5:
            raise ConfigurationError(
                f"{structure} has {len(chosen)} alpha carbons (CA): a chain of at least five is needed"
            )
        positions = np.array(file.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
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

    def with_epsilon(self, epsilon: float) -> GoModel:
        """Return the model with another unit of energy."""
        return replace(self, epsilon=epsilon)

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
        force = openmm.CustomBondForce("strength*(5*(sigma/r)^12-6*(sigma/r)^10)")
        force.addPerBondParameter("strength")
        force.addPerBondParameter("sigma")
        for i, j in self.contacts:
            sigma = float(np.linalg.norm(self.native[i] - self.native[j]))
            force.addBond(i, j, [self.contact_strength * self.epsilon, sigma])
        return force

    def _repulsion(self) -> openmm.Force:
        force = openmm.CustomBondForce("strength*(sigma/r)^12")
        force.addPerBondParameter("strength")
        force.addPerBondParameter("sigma")
        near = set(self.contacts)
        for i in range(len(self.beads)):
            for j in range(i + _SMALLEST_SEPARATION + 1, len(self.beads)):
                if (i, j) not in near:
                    force.addBond(i, j, [self.epsilon, self.repulsive_range])
        return force
