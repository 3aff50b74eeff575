"""Topologies and trajectories between flowbridge and mdtraj."""

from dataclasses import replace

import mdtraj
import numpy as np
import pytest

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.potential import Particles
from flowbridge.core.samples import WeightedSamples
from flowbridge.integrations.mdtraj.exports import (
    particles_from_mdtraj,
    topology_from_particles,
    trajectory_from_samples,
)


def test_topology_equals_that_of_the_same_molecule_from_openmm(alanine):
    topology = topology_from_particles(alanine.particles)
    reference = mdtraj.Topology.from_openmm(alanine.topology)
    assert [(a.name, a.element, a.residue.name, a.residue.resSeq) for a in topology.atoms] == [
        (a.name, a.element, a.residue.name, a.residue.resSeq) for a in reference.atoms
    ]
    assert {frozenset((a.index, b.index)) for a, b in topology.bonds} == {
        frozenset((a.index, b.index)) for a, b in reference.bonds
    }
    assert topology.n_chains == 1


def test_round_trip_of_particles(alanine):
    topology = topology_from_particles(alanine.particles)
    back = particles_from_mdtraj(topology, alanine.particles.masses)
    # mdtraj turns each bond so that its lower index comes first.
    turned = tuple((min(bond), max(bond)) for bond in alanine.particles.bonds)
    assert back == replace(alanine.particles, bonds=turned)
    assert particles_from_mdtraj(topology).masses == pytest.approx(alanine.particles.masses, rel=1e-4)


def test_a_residue_that_comes_back_keeps_the_order_of_particles():
    particles = Particles(("A", "B", "C"), (6, 7, 8), (12.0, 14.0, 16.0), ((0, 2),), ("ONE", "TWO", "ONE"), (0, 1, 0))
    topology = topology_from_particles(particles)
    assert [a.name for a in topology.atoms] == ["A", "B", "C"]
    assert [(r.name, r.resSeq) for r in topology.residues] == [("ONE", 1), ("TWO", 2), ("ONE", 1)]
    assert [(a.index, b.index) for a, b in topology.bonds] == [(0, 2)]


def test_beads_need_masses():
    beads = Particles(("B1", "B2"), (0, 0), (72.0, 54.0))
    topology = topology_from_particles(beads)
    with pytest.raises(ConfigurationError, match=r"2 particles have no element.*B1"):
        particles_from_mdtraj(topology)
    assert particles_from_mdtraj(topology, [72.0, 54.0]) == beads
    with pytest.raises(ConfigurationError, match="masses has 1 entries for 2"):
        particles_from_mdtraj(topology, [72.0])


def test_analysis_of_a_trajectory_of_samples(alanine):
    positions = alanine.shaken(30)
    trajectory = trajectory_from_samples(WeightedSamples(positions, np.zeros(30), alanine.particles, 300.0))
    reference = mdtraj.Trajectory(positions, mdtraj.Topology.from_openmm(alanine.topology))
    for compute in (mdtraj.compute_phi, mdtraj.compute_psi):
        assert np.array_equal(compute(trajectory)[1], compute(reference)[1])
    assert mdtraj.baker_hubbard(trajectory).tolist() == mdtraj.baker_hubbard(reference).tolist()


def test_pdb_of_a_sample(alanine, tmp_path):
    samples = WeightedSamples(alanine.shaken(2), np.zeros(2), alanine.particles, 300.0)
    samples.to_mdtraj()[0].save_pdb(str(tmp_path / "sample.pdb"))
    loaded = mdtraj.load(str(tmp_path / "sample.pdb"))
    assert loaded.xyz[0] == pytest.approx(samples.positions[0], abs=1e-3)
    assert [r.name for r in loaded.topology.residues] == ["ACE", "ALA", "NME"]
