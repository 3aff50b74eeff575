"""Force maps: the mean force is the same for all of them, the noise is not."""

import numpy as np
import pytest

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.potential import Particles
from flowbridge.forcefields.beads.force_maps import ForceMap, bonded_force_map, optimised_force_map, plain_force_map
from flowbridge.forcefields.beads.mappings import centre_of_mass_mapping, five_beads, slice_mapping

STIFFNESS = np.array([50.0, 20.0])
KT = 2.5


@pytest.fixture(scope="module")
def chain():
    """Three particles joined by springs, with forces; the outer two are to be beads."""
    particles = Particles(("A", "B", "C"), (0, 0, 0), (1.0, 2.0, 3.0), ((0, 1), (1, 2)))
    random = np.random.default_rng(0)
    ends = random.standard_normal((200_000, 2, 3))
    weights = STIFFNESS / STIFFNESS.sum()
    noise = np.sqrt(KT / STIFFNESS.sum()) * random.standard_normal((len(ends), 3))
    middle = weights[0] * ends[:, 0] + weights[1] * ends[:, 1] + noise
    positions = np.stack([ends[:, 0], middle, ends[:, 1]], axis=1)
    first = -STIFFNESS[0] * (positions[:, 0] - positions[:, 1])
    last = -STIFFNESS[1] * (positions[:, 2] - positions[:, 1])
    return particles, positions, np.stack([first, -first - last, last], axis=1)


class TestHarmonicChain:
    """The mean force between the outer particles is known."""

    @pytest.mark.parametrize("kind", ["plain", "optimised"])
    def test_mean_force(self, chain, kind):
        particles, positions, forces = chain
        mapping = slice_mapping(particles, [0, 2])
        found = plain_force_map(mapping) if kind == "plain" else optimised_force_map(mapping, forces)
        beads, mapped = mapping.positions(positions), found.forces(forces)
        effective = STIFFNESS.prod() / STIFFNESS.sum()
        expected = -effective * (beads[:, 0] - beads[:, 1])
        # Regression of the noisy force on the exact mean force: slope one.
        slope = (mapped[:, 0] * expected).sum() / np.square(expected).sum()
        error = np.std(mapped[:, 0] * expected) / np.square(expected).mean() / np.sqrt(expected.size)
        assert abs(slope - 1.0) < 4.0 * error

    def test_the_optimum_is_noiseless_here(self, chain):
        """Adding the middle's force in proportion to its springs takes out all the noise."""
        particles, _positions, forces = chain
        found = optimised_force_map(slice_mapping(particles, [0, 2]), forces)
        share = STIFFNESS / STIFFNESS.sum()
        assert np.allclose(found.weights, [[1.0, share[0], 0.0], [0.0, share[1], 1.0]], atol=2e-3)


class TestAlanine:
    def test_less_noise_and_the_same_mean_force(self, alanine, alanine_run):
        frames, constraints = alanine_run
        mapping = five_beads(alanine.particles)
        plain = plain_force_map(mapping, constraints)
        best = optimised_force_map(mapping, frames.forces, constraints)
        a, b = plain.forces(frames.forces), best.forces(frames.forces)
        assert np.square(b).mean() < 0.7 * np.square(a).mean()
        # The difference is noise: uncorrelated with any function of the beads, here the directions of the bonds.
        beads = mapping.positions(frames.positions)
        bonds = beads[:, 1:] - beads[:, :-1]
        for bead in range(5):
            for bond in range(4):
                products = ((a - b)[:, bead] * bonds[:, bond]).sum(-1)
                blocks = products.reshape(20, -1).mean(1)
                assert abs(products.mean()) < 4.5 * blocks.std(ddof=1) / np.sqrt(20)

    def test_constrained_atoms_count_together(self, alanine, alanine_run):
        frames, constraints = alanine_run
        for found in (
            plain_force_map(five_beads(alanine.particles), constraints),
            optimised_force_map(five_beads(alanine.particles), frames.forces, constraints),
        ):
            for i, j in constraints:
                assert np.array_equal(found.weights[:, i], found.weights[:, j])

    def test_bonds_alone_find_nearly_the_optimum(self, alanine, alanine_run):
        """Without a look at a frame; and the mean force is that of the plain map, by the test above's argument."""
        frames, constraints = alanine_run
        mapping = five_beads(alanine.particles)
        found = bonded_force_map(mapping, constraints)
        size = np.square(found.forces(frames.forces)).mean()
        best = np.square(optimised_force_map(mapping, frames.forces, constraints).forces(frames.forces)).mean()
        assert size < 1.1 * best
        assert np.allclose(found.weights.sum(0), 1.0)
        for i, j in constraints:
            assert np.array_equal(found.weights[:, i], found.weights[:, j])

    def test_centres_of_mass(self, alanine, alanine_run):
        frames, constraints = alanine_run
        mapping = centre_of_mass_mapping(alanine.particles, [range(6), range(6, 16), range(16, 22)])
        found = plain_force_map(mapping, constraints)
        assert np.allclose(found.forces(frames.forces)[:, 0], frames.forces[:, :6].sum(1))
        total = optimised_force_map(mapping, frames.forces, constraints).weights.sum(0)
        assert np.allclose(total, 1.0)  # no atom is left out of three beads that hold all


class TestRefused:
    def test_constraints_between_beads(self, alanine):
        with pytest.raises(ConfigurationError, match=r"constraints join .*bead 1 with an atom of bead 0"):
            plain_force_map(five_beads(alanine.particles), [(4, 6)])

    def test_bonded_maps_that_cannot_be(self, alanine):
        mapping = centre_of_mass_mapping(alanine.particles, [range(6), range(6, 16), range(16, 22)])
        with pytest.raises(ConfigurationError, match="beads of one atom each"):
            bonded_force_map(mapping)
        with pytest.raises(ConfigurationError, match="different beads: take plain_force_map"):
            bonded_force_map(five_beads(alanine.particles), [(5, 7)])

    def test_another_map(self, alanine):
        mapping = five_beads(alanine.particles)
        with pytest.raises(ConfigurationError, match="does not belong to the mapping"):
            ForceMap(mapping, 2.0 * mapping.weights)

    def test_too_few_frames(self, alanine):
        with pytest.raises(ConfigurationError, match="3 frames are too few"):
            optimised_force_map(five_beads(alanine.particles), np.ones((3, 22, 3)))

    def test_forces_that_are_not_finite(self, alanine):
        forces = np.ones((200, 22, 3))
        forces[7, 0, 0] = np.inf
        with pytest.raises(ConfigurationError, match="forces that are not finite, first frame 7"):
            optimised_force_map(five_beads(alanine.particles), forces)
