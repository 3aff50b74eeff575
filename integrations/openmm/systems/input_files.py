"""A molecule for OpenMM: topology, System and starting positions from input files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from ....core.errors import ConfigurationError, MissingDependencyError
from .peptides import peptide
from .topologies import molecule_topology, read_structure

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_RELAXED_FORCE = 10.0  # kJ/mol/nm, root mean square at which a relaxation ends


@dataclass(frozen=True)
class MolecularSystem:
    """One molecule with its force field.

    Attributes:
        topology: OpenMM topology.
        system: OpenMM System without constraints.
        positions: ``(N, 3)`` in nm.
    """

    topology: app.Topology
    system: openmm.System
    positions: FloatArray

    def __post_init__(self) -> None:
        n = self.system.getNumParticles()
        if self.topology.getNumAtoms() != n or self.positions.shape != (n, 3):
            raise ConfigurationError(
                f"topology ({self.topology.getNumAtoms()} atoms), positions {self.positions.shape} and System "
                f"({n} particles) do not describe the same molecule"
            )
        if self.system.getNumConstraints():
            raise ConfigurationError(
                f"the System has {self.system.getNumConstraints()} constraints, but a flow samples every bond: "
                "create it with constraints=None and rigidWater=False"
            )
        for index in range(n):
            if self.system.isVirtualSite(index):
                raise ConfigurationError(f"particle {index} is a virtual site; a flow cannot sample it independently")

    @property
    def system_xml(self) -> str:
        """The serialised System, for worker processes and digests."""
        return str(openmm.XmlSerializer.serialize(self.system))

    def torsion_atoms(self, atoms: tuple[int | str, ...]) -> tuple[int, int, int, int]:
        """Return the indices of four atoms given as indices or as ``"RES:NAME"`` / ``"2:NAME"`` labels.

        Raises ConfigurationError when a label fits no atom or several.
        """
        if len(atoms) != 4:
            raise ConfigurationError(f"a torsion has four atoms, got {len(atoms)}: {atoms}")
        i, j, k, m = (self._atom_index(atom) for atom in atoms)
        return i, j, k, m

    def _atom_index(self, atom: int | str) -> int:
        if isinstance(atom, int):
            if not 0 <= atom < self.system.getNumParticles():
                raise ConfigurationError(f"atom index {atom} is outside 0..{self.system.getNumParticles() - 1}")
            return atom
        residue, separator, name = atom.partition(":")
        found = [
            a.index
            for a in self.topology.atoms()
            if separator and a.name == name and residue in (a.residue.name, a.residue.id)
        ]
        if len(found) != 1:
            known = ", ".join(f"{a.residue.name}:{a.name}" for a in self.topology.atoms())
            raise ConfigurationError(f"{atom!r} fits {len(found)} atoms; give RESIDUE:NAME with one of {known}")
        return found[0]


def load_system(
    *,
    structure: Path | None = None,
    smiles: str | None = None,
    sequence: str | None = None,
    force_field: tuple[str, ...] = (),
    system_file: Path | None = None,
    folder: Path = Path("."),
) -> MolecularSystem:
    """Read a molecule with its force field.

    Args:
        structure: PDB or mmCIF file with all hydrogens.
        smiles: a SMILES string instead of a structure; needs RDKit, and a force field with a template for it.
        sequence: one-letter codes of a peptide instead of a structure (see
            :func:`~flowbridge.integrations.openmm.systems.peptides.peptide`); it is relaxed with the force field.
        force_field: OpenMM force-field XML files, by path or by the names OpenMM ships.
        system_file: a System serialised by ``openmm.XmlSerializer``, instead of a force field.
        folder: folder of relative paths.

    Raises:
        ConfigurationError: for missing, contradicting or unusable input.
    """
    if sum(given is not None for given in (structure, smiles, sequence)) != 1:
        raise ConfigurationError(
            "give exactly one of structure (a PDB or mmCIF file), smiles and sequence (of a peptide)"
        )
    if bool(force_field) == (system_file is not None):
        raise ConfigurationError("give exactly one of force_field (XML files) and system (a serialised System)")
    if structure is not None:
        topology, positions = read_structure(folder / structure)
    else:
        topology, positions = peptide(sequence) if sequence is not None else _from_smiles(str(smiles))
    if system_file is not None:
        path = folder / system_file
        if not path.is_file():
            raise ConfigurationError(f"the serialised System {path} does not exist")
        system = openmm.XmlSerializer.deserialize(path.read_text())
        if not isinstance(system, openmm.System):
            raise ConfigurationError(f"{path} holds a {type(system).__name__}, not an OpenMM System")
    else:
        names = [str(folder / name) if (folder / name).is_file() else name for name in force_field]
        try:
            system = app.ForceField(*names).createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None)
        except ValueError as error:
            raise ConfigurationError(
                f"the force field {', '.join(force_field)} does not fit the molecule: {error}"
            ) from error
    if sequence is not None:
        positions = _relaxed(system, positions)
    return MolecularSystem(topology, system, positions)


def _relaxed(system: openmm.System, positions: FloatArray) -> FloatArray:
    """Return positions near the next energy minimum; always on the Reference platform, so that they are reproducible."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, _RELAXED_FORCE)
    state = context.getState(positions=True)
    return np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)


def _from_smiles(smiles: str) -> tuple[app.Topology, FloatArray]:
    try:
        from rdkit import Chem
        from rdkit.Chem import rdDistGeom
    except ImportError as error:
        raise MissingDependencyError("SMILES input needs RDKit: pip install 'flowbridge[molecules]'") from error
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise ConfigurationError(f"RDKit cannot read the SMILES {smiles!r}")
    molecule = Chem.AddHs(parsed)
    if rdDistGeom.EmbedMolecule(molecule, randomSeed=1) != 0:
        raise ConfigurationError(f"RDKit finds no three-dimensional structure for {smiles!r}; give a PDB file instead")
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    topology = molecule_topology([atom.GetSymbol() for atom in molecule.GetAtoms()], bonds)
    angstrom = unit.angstrom.conversion_factor_to(unit.nanometer)
    return topology, np.asarray(molecule.GetConformer().GetPositions()) * angstrom
