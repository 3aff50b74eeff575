"""Free-energy differences through maps, against closed forms and quadrature."""

import numpy as np
import openmm
import pytest

from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError, OverlapError
from flowbridge.core.potential import Particles
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.targeted_free_energy import targeted_free_energy
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.generator_map import GeneratorMap

PEROXIDE = Particles(("H1", "O1", "O2", "H2"), (1, 8, 8, 1), (1.008, 15.999, 15.999, 1.008), ((0, 1), (1, 2), (2, 3)))
SMALL = FlowConfiguration.model_validate(
    {"torsions": {"couplings": 1, "components": 3, "hidden": [8]}, "stiff": {"couplings": 1, "hidden": [8]}}
)


class Gaussian:
    """Independent normal coordinates of two particles: the partition function is (2 pi)^3 times the widths' product."""

    particles = Particles(("A", "B"), (18, 18), (39.9, 39.9))

    def __init__(self, centres, widths, temperature):
        self.centres, self.widths, self.temperature = np.array(centres), np.array(widths), temperature

    def energies_and_forces(self, positions):
        z = (positions - self.centres) / self.widths
        kt = thermal_energy(self.temperature)
        return 0.5 * kt * (z**2).sum((1, 2)), -kt * z / self.widths

    def samples(self, count, random) -> WeightedSamples:
        drawn = self.centres + self.widths * random.standard_normal((count, 2, 3))
        return WeightedSamples(drawn, np.zeros(count), self.particles, self.temperature)


class Scaling:
    """``M(x) = shift + factor x``."""

    def __init__(self, factor, shift):
        self.factor, self.shift = factor, shift

    def forward(self, positions):
        return self.shift + self.factor * positions, np.full(len(positions), np.log(self.factor).sum())

    def inverse(self, positions):
        return (positions - self.shift) / self.factor, np.full(len(positions), -np.log(self.factor).sum())


class TestGaussians:
    def pair(self):
        random = np.random.default_rng(4)
        widths = random.uniform(0.02, 0.1, (2, 2, 3))
        # So far apart that no sample of one is possible in the other.
        a, b = Gaussian(np.zeros((2, 3)), widths[0], 250.0), Gaussian(np.full((2, 3), 2.0), widths[1], 400.0)
        return a, b, -float(np.log(widths[1] / widths[0]).sum())

    def test_the_exact_map_has_no_error(self):
        a, b, expected = self.pair()
        random = np.random.default_rng(5)
        factor = b.widths / a.widths
        found = targeted_free_energy(a.samples(50, random), b.samples(70, random), a, b, Scaling(factor, b.centres))
        assert found.difference.value == pytest.approx(expected, abs=1e-9)
        assert np.allclose(found.forward_works, expected, atol=1e-9)
        assert (found.forward, found.reverse) == pytest.approx((expected, expected), abs=1e-9)

    def test_errors_of_a_rough_map_cover_the_answer(self):
        a, b, expected = self.pair()
        factor = b.widths / a.widths * np.array([[1.2, 0.8, 1.0], [0.9, 1.1, 1.0]])
        deviations = []
        for seed in range(60):
            random = np.random.default_rng(seed)
            sets = a.samples(300, random), b.samples(300, random)
            found = targeted_free_energy(*sets, a, b, Scaling(factor, b.centres + 0.01), seed=seed).difference
            deviations.append((found.value - expected) / found.error)
        assert abs(np.mean(deviations)) < 0.4  # 60 of unit variance: 0.13
        assert 0.75 < np.std(deviations) < 1.3
        assert 50 <= (np.abs(deviations) < 2.0).sum() <= 60

    def test_no_map_no_overlap(self):
        a, b, _ = self.pair()
        random = np.random.default_rng(6)
        with pytest.raises(OverlapError):
            targeted_free_energy(a.samples(300, random), b.samples(300, random), a, b, Scaling(np.ones((2, 3)), 0.0))

    def test_bad_input(self):
        a, b, _ = self.pair()
        random = np.random.default_rng(7)
        of_a, of_b = a.samples(20, random), b.samples(20, random)
        other = WeightedSamples(of_b.positions, of_b.log_weights, Particles(("A", "C"), (18, 6), (39.9, 12.0)), 400.0)
        mapping = Scaling(np.ones((2, 3)), 0.0)
        with pytest.raises(MoleculeMismatchError, match="different particles"):
            targeted_free_energy(of_a, other, a, b, mapping)

        class Broken(Scaling):
            def forward(self, positions):
                mapped, determinants = super().forward(positions)
                return mapped, np.where(np.arange(len(mapped)) == 3, np.nan, determinants)

        with pytest.raises(NonFiniteEnergyError, match=r"1 of 20 samples of ensemble a .*index 3"):
            targeted_free_energy(of_a, of_b, a, b, Broken(np.ones((2, 3)), 0.0))
        with pytest.raises(ValueError, match="weight"):
            targeted_free_energy(
                WeightedSamples(of_a.positions, np.full(20, -np.inf), a.particles, 250.0), of_b, a, b, mapping
            )


class Peroxide:
    """H-O-O-H with harmonic bonds and angles and a cosine: the integrals factorise, samples are exact and independent."""

    def __init__(self, temperature, bond, angle, barrier):
        self.temperature, self.bond, self.angle, self.barrier = temperature, bond, angle, barrier

    def system(self) -> openmm.System:
        system = openmm.System()
        for mass in PEROXIDE.masses:
            system.addParticle(mass)
        bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
        for i, j in PEROXIDE.bonds:
            bonds.addBond(i, j, *self.bond)
        for i in (0, 1):
            angles.addAngle(i, i + 1, i + 2, *self.angle)
        torsions.addTorsion(0, 1, 2, 3, 2, 0.3, self.barrier)
        for force in (bonds, angles, torsions):
            system.addForce(force)
        return system

    def densities(self):
        """Grids and unnormalised densities of a bond, an angle and the torsion, volume element included."""
        kt = thermal_energy(self.temperature)
        r, t, p = np.linspace(0.02, 0.4, 40_001), np.linspace(0.0, np.pi, 40_001), np.linspace(-np.pi, np.pi, 40_001)
        (r0, kr), (t0, k_angle) = self.bond, self.angle
        return (
            (r, r**2 * np.exp(-0.5 * kr * (r - r0) ** 2 / kt)),
            (t, np.sin(t) * np.exp(-0.5 * k_angle * (t - t0) ** 2 / kt)),
            (p, np.exp(-self.barrier * (1.0 + np.cos(2.0 * p - 0.3)) / kt)),
        )

    def free_energy(self) -> float:
        bond, angle, torsion = (np.log(np.trapezoid(y, x)) for x, y in self.densities())
        return -float(3 * bond + 2 * angle + torsion)

    def samples(self, count, random) -> WeightedSamples:
        bond, angle, torsion = self.densities()
        r, t, p = (draw(*bond, (count, 3), random), draw(*angle, (count, 2), random), draw(*torsion, count, random))
        zero = np.zeros(count)
        first = np.stack([r[:, 0] * np.cos(t[:, 0]), r[:, 0] * np.sin(t[:, 0]), zero], 1)
        last = np.stack(
            [-r[:, 2] * np.cos(t[:, 1]), r[:, 2] * np.sin(t[:, 1]) * np.cos(p), r[:, 2] * np.sin(t[:, 1]) * np.sin(p)],
            1,
        )
        middle = np.stack([r[:, 1], zero, zero], 1)
        positions = np.stack([first, np.zeros((count, 3)), middle, middle + last], 1)
        return WeightedSamples(positions, np.zeros(count), PEROXIDE, self.temperature)


def draw(grid, density, shape, random):
    cumulative = np.cumsum(density)
    return np.interp(random.uniform(size=shape), cumulative / cumulative[-1], grid)


class TestGenerators:
    A = Peroxide(300.0, (0.10, 4.0e5), (1.8, 500.0), 4.0)
    B = Peroxide(360.0, (0.12, 2.5e5), (1.5, 250.0), 6.0)

    def mapping(self) -> GeneratorMap:
        random = np.random.default_rng(1)
        return GeneratorMap(
            *(
                BoltzmannGenerator.untrained(PEROXIDE, side.temperature, side.samples(2000, random).positions, SMALL)
                for side in (self.A, self.B)
            )
        )

    def test_map_is_inverse_and_its_determinant_is_right(self):
        mapping, samples = self.mapping(), self.A.samples(50, np.random.default_rng(2))
        moved, determinants = mapping.forward(samples.positions)
        back, inverse = mapping.inverse(moved)
        assert np.allclose(determinants, -inverse, atol=1e-8)
        for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)):
            before = np.linalg.norm(samples.positions[:, i] - samples.positions[:, j], axis=1)
            assert np.allclose(np.linalg.norm(back[:, i] - back[:, j], axis=1), before, atol=1e-9)

    def test_two_force_fields_at_two_temperatures(self):
        """Bonds 0.02 nm apart, 17 standard deviations: no sample of one is possible in the other."""
        mapping, expected = self.mapping(), self.B.free_energy() - self.A.free_energy()
        systems = self.A.system(), self.B.system()
        deviations = []
        for seed in range(20):
            random = np.random.default_rng(100 + seed)
            sets = self.A.samples(400, random), self.B.samples(400, random)
            found = targeted_free_energy(*sets, *systems, mapping, seed=seed).difference
            deviations.append((found.value - expected) / found.error)
            assert found.error < 0.1
        assert abs(np.mean(deviations)) < 0.8  # 20 of unit variance: 0.22
        assert 0.6 < np.std(deviations) < 1.5

    def test_latent_variables_that_differ(self, alanine):
        random = np.random.default_rng(3)
        frames = self.A.samples(500, random).positions
        whitened = BoltzmannGenerator.untrained(PEROXIDE, 300.0, frames, SMALL)
        design = SMALL.model_copy(
            update={"stiff": SMALL.stiff.model_copy(update={"map": "interval", "transform": "bumps"})}
        )
        interval = BoltzmannGenerator.untrained(PEROXIDE, 300.0, frames, design)
        with pytest.raises(ConfigurationError, match="normal and uniform"):
            GeneratorMap(whitened, interval)
        peptide = BoltzmannGenerator.untrained(alanine.particles, 300.0, alanine.shaken(200), SMALL)
        with pytest.raises(MoleculeMismatchError, match="different molecules"):
            GeneratorMap(whitened, peptide)
