"""Mappings: what beads are, how they are bonded, and what is refused."""

import mdtraj
import numpy as np
import pytest
from openmm import app

from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError
from flowbridge.core.potential import Particles
from flowbridge.forcefields.beads.mappings import (
    Mapping,
    alpha_carbons,
    backbone,
    centre_of_mass_mapping,
    five_beads,
    identity_mapping,
    slice_mapping,
)
from flowbridge.integrations.mdtraj.bead_selections import (
    mapping_from_selections,
    write_bead_pdb,
)
from flowbridge.integrations.mdtraj.exports import topology_from_particles
from flowbridge.integrations.openmm.systems.topologies import openmm_topology


class TestNamed:
    def test_five_beads(self, alanine):
        mapping = five_beads(alanine.particles)
        assert mapping.beads.names == ("C", "N", "CA", "C", "N")
        assert mapping.beads.residue_names == ("ACE", "ALA", "ALA", "ALA", "NME")
        assert mapping.beads.bonds == ((0, 1), (1, 2), (2, 3), (3, 4))
        assert np.array_equal(mapping.positions(alanine.positions[None])[0], alanine.positions[[4, 6, 8, 14, 16]])

    def test_alpha_carbons_and_backbone(self, alanine):
        assert alpha_carbons(alanine.particles).members(0) == (8,)
        found = backbone(alanine.particles)
        assert found.beads.names == ("C", "N", "CA", "C", "N", "C")
        assert len(found.beads.bonds) == 5

    def test_molecules_without_the_atoms(self):
        argon = Particles(("Ar",), (18,), (39.9,))
        for named in (alpha_carbons, backbone, five_beads):
            with pytest.raises(ConfigurationError, match=r"lacks|has no"):
                named(argon)


class TestCentresOfMass:
    def test_positions_and_masses(self, alanine):
        atoms = alanine.particles
        groups = [range(6), range(6, 16), range(16, 22)]
        mapping = centre_of_mass_mapping(atoms, groups, ["A", "B", "C"], complete=True)
        masses = np.array(atoms.masses)
        expected = [np.average(alanine.positions[list(g)], axis=0, weights=masses[list(g)]) for g in groups]
        assert np.allclose(mapping.positions(alanine.positions[None])[0], expected, atol=1e-14)
        assert np.isclose(sum(mapping.beads.masses), masses.sum())
        assert mapping.beads.bonds == ((0, 1), (1, 2))

    def test_a_bead_moves_with_its_atoms(self, alanine):
        mapping = centre_of_mass_mapping(alanine.particles, [range(11), range(11, 22)])
        shift = np.array([0.3, -0.2, 0.7])
        moved = mapping.positions(alanine.positions[None] + shift)
        assert np.allclose(moved, mapping.positions(alanine.positions[None]) + shift, atol=1e-14)

    def test_lost_atoms(self, alanine):
        with pytest.raises(ConfigurationError, match=r"2 atoms are in no bead, the first is .*atom 20 of NME"):
            centre_of_mass_mapping(alanine.particles, [range(20)], complete=True)


class TestRefused:
    def test_shared_atoms(self, alanine):
        with pytest.raises(ConfigurationError, match=r"atom 5 of ACE 1.* is in beads 0 and 1"):
            centre_of_mass_mapping(alanine.particles, [range(6), range(5, 10)])
        weights = np.zeros((2, 22))
        weights[:, 3] = 1.0
        beads = slice_mapping(alanine.particles, [0, 1]).beads
        with pytest.raises(ConfigurationError, match="in 2 beads"):
            Mapping(alanine.particles, beads, weights)

    def test_rows_that_do_not_sum_to_one(self, alanine):
        beads = slice_mapping(alanine.particles, [0]).beads
        with pytest.raises(ConfigurationError, match=r"sum to 0\.5"):
            Mapping(alanine.particles, beads, 0.5 * np.eye(22)[:1])

    @pytest.mark.parametrize("groups", [[[0], []], [[0, 22]], [[-1]], []])
    def test_groups(self, alanine, groups):
        with pytest.raises(ConfigurationError):
            centre_of_mass_mapping(alanine.particles, groups)

    def test_frames_of_another_molecule(self, alanine):
        with pytest.raises(MoleculeMismatchError, match=r"got \(3, 21, 3\).*belong"):
            five_beads(alanine.particles).positions(np.zeros((3, 21, 3)))

    def test_frames_that_are_not_finite(self, alanine):
        frames = alanine.shaken(4)
        frames[2, 8, 1] = np.nan
        with pytest.raises(ConfigurationError, match=r"1 of 4 frames .* first frame 2 at CA"):
            five_beads(alanine.particles).positions(frames)


class TestSelections:
    def test_selections_of_mdtraj(self, alanine):
        topology = topology_from_particles(alanine.particles)
        beads = {"ACE": "resname ACE", "BB": "resname ALA and backbone", "SC": "resname ALA and sidechain"}
        mapping = mapping_from_selections(topology, beads)
        assert mapping.beads.names == ("ACE", "BB", "SC")
        assert (0, 1) in mapping.beads.bonds

    def test_slices(self, alanine):
        topology = topology_from_particles(alanine.particles)
        mapping = mapping_from_selections(topology, {"X": "name CA"}, slices=True)
        assert mapping.members(0) == (8,)
        with pytest.raises(ConfigurationError, match="selects 6"):
            mapping_from_selections(topology, {"X": "resname ACE"}, slices=True)

    @pytest.mark.parametrize(
        ("text", "message"), [("resname XYZ", "matches no atom"), ("this is (none", "cannot read")]
    )
    def test_bad_selections(self, alanine, text, message):
        with pytest.raises(ConfigurationError, match=message):
            mapping_from_selections(topology_from_particles(alanine.particles), {"X": text})


class TestTopologies:
    def test_a_pdb_file_that_both_read(self, alanine, tmp_path):
        mapping = five_beads(alanine.particles)
        positions = mapping.positions(alanine.positions[None])[0]
        write_bead_pdb(mapping.beads, positions, tmp_path / "beads.pdb")
        read = mdtraj.load(str(tmp_path / "beads.pdb"))
        assert np.allclose(read.xyz[0], positions, atol=2e-4)
        assert [atom.name for atom in read.topology.atoms] == list(mapping.beads.names)
        pdb = app.PDBFile(str(tmp_path / "beads.pdb"))
        assert [residue.name for residue in pdb.topology.residues()] == ["ACE", "ALA", "NME"]
        bonds = {frozenset((b.atom1.index, b.atom2.index)) for b in pdb.topology.bonds()}
        assert bonds <= {frozenset(bond) for bond in mapping.beads.bonds}

    def test_openmm_topology(self, alanine):
        beads = five_beads(alanine.particles).beads
        topology = openmm_topology(beads)
        assert [atom.element for atom in topology.atoms()] == [None] * 5
        assert [(b.atom1.index, b.atom2.index) for b in topology.bonds()] == list(beads.bonds)


def test_identity(alanine):
    mapping = identity_mapping(alanine.particles)
    assert np.array_equal(mapping.positions(alanine.positions[None])[0], alanine.positions)
