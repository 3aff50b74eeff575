"""Peptides from a sequence: what chemistry says about them."""

import io
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit
from rdkit import Chem

from flowbridge.core.errors import ConfigurationError
from flowbridge.integrations.openmm.systems.input_files import load_system
from flowbridge.integrations.openmm.systems.peptides import AMINO_ACIDS, peptide
from flowbridge.workflows.coarse_graining.configuration import read_coarse_graining
from flowbridge.workflows.coarse_graining.reference import reference_model

EXAMPLES = Path(__file__).parents[2] / "examples"
FORCE_FIELD = ("amber99sbildn.xml", "amber99_obc.xml")


def omega(topology, positions):
    """Return the torsions of the peptide bonds in degrees."""
    trajectory = mdtraj.Trajectory(positions, mdtraj.Topology.from_openmm(topology))
    return np.degrees(mdtraj.compute_omega(trajectory)[1][0])


def handedness(topology: app.Topology, positions: np.ndarray) -> list[float]:
    """Return the signed volume of N, C, CB around each CA, nm^3: positive for L."""
    volumes = []
    for residue in topology.residues():
        named = {atom.name: positions[atom.index] for atom in residue.atoms()}
        if residue.name != "GLY":
            n, c, b = (named[name] - named["CA"] for name in ("N", "C", "CB"))
            volumes.append(float(np.dot(np.cross(n, c), b)))
    return volumes


def nearest(topology: app.Topology, positions: np.ndarray) -> float:
    """Return the smallest distance of two atoms that are not bonded, nm."""
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    for one, other in topology.bonds():
        apart[one.index, other.index] = apart[other.index, one.index] = np.inf
    return float(apart.min())


def test_every_amino_acid_by_its_names():
    """The force field has a template for each residue, hydrogens and charged ends included."""
    topology, positions = peptide(AMINO_ACIDS)
    assert [residue.name for residue in topology.residues()] == [
        "ALA", "CYS", "ASP", "GLU", "PHE", "GLY", "HIS", "ILE", "LYS", "LEU",
        "MET", "ASN", "PRO", "GLN", "ARG", "SER", "THR", "VAL", "TRP", "TYR",
    ]  # fmt: skip
    system = app.ForceField(*FORCE_FIELD).createSystem(topology, constraints=None)
    assert positions.shape == (system.getNumParticles(), 3)
    nonbonded = next(force for force in system.getForces() if isinstance(force, openmm.NonbondedForce))
    charge = sum(nonbonded.getParticleParameters(i)[0]._value for i in range(system.getNumParticles()))
    assert charge == pytest.approx(0.0, abs=1e-5)  # K and R against D and E, and the two ends
    assert min(handedness(topology, positions)) > 0.0
    assert np.abs(omega(topology, positions)).min() > 150.0


def test_side_chains_with_centres_of_their_own():
    """Isoleucine is (2S, 3S), threonine (2S, 3R)."""
    topology, positions = peptide("AITA")
    file = io.StringIO()
    app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    molecule = Chem.MolFromPDBBlock(file.getvalue(), removeHs=False)
    Chem.AssignStereochemistryFrom3D(molecule)
    labels = {}
    for atom in molecule.GetAtoms():
        if atom.HasProp("_CIPCode"):
            info = atom.GetPDBResidueInfo()
            labels[info.GetResidueName(), info.GetName().strip()] = atom.GetProp("_CIPCode")
    assert (labels["ILE", "CA"], labels["ILE", "CB"]) == ("S", "S")
    assert (labels["THR", "CA"], labels["THR", "CB"]) == ("S", "R")


def test_chignolin_for_a_system():
    molecule = load_system(sequence="yydpetgtwy", force_field=FORCE_FIELD)
    assert molecule.system.getNumParticles() == 166
    assert len(omega(molecule.topology, molecule.positions)) == 9
    assert np.abs(omega(molecule.topology, molecule.positions)).min() > 150.0
    assert min(handedness(molecule.topology, molecule.positions)) > 0.0
    assert nearest(molecule.topology, molecule.positions) > 0.14
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(molecule.positions)
    forces = context.getState(forces=True).getForces(asNumpy=True)._value
    assert np.sqrt(np.square(forces).mean()) < 30.0  # relaxed
    again = load_system(sequence="YYDPETGTWY", force_field=FORCE_FIELD)
    assert np.array_equal(again.positions, molecule.positions)


def test_example_maps_chignolin_to_its_alpha_carbons():
    settings, folder = read_coarse_graining(EXAMPLES / "chignolin_coarse_all_atom.toml"), EXAMPLES
    model = reference_model(settings, folder)
    assert list(model.mapping.beads.residue_names) == [
        "TYR", "TYR", "ASP", "PRO", "GLU", "THR", "GLY", "THR", "TRP", "TYR",
    ]  # fmt: skip
    assert model.system.getNumConstraints() > 0
    beads = model.mapping.positions(model.positions[None])[0]
    steps = np.linalg.norm(np.diff(beads, axis=0), axis=1)
    assert np.all((steps > 0.36) & (steps < 0.40))  # alpha carbons across trans peptide bonds


@pytest.mark.parametrize(
    ("sequence", "message"),
    [("AXZ", r"it has 'X', 'Z'"), ("A", "too short"), ("", "too short"), ("AC D", r"it has ' '")],
)
def test_what_is_no_sequence(sequence, message):
    with pytest.raises(ConfigurationError, match=message):
        peptide(sequence)


def test_one_source_of_a_molecule():
    with pytest.raises(ConfigurationError, match=r"exactly one of structure .*, smiles and sequence"):
        load_system(sequence="AA", smiles="CC", force_field=FORCE_FIELD)
