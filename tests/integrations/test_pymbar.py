"""Free energies between states against analytic results, and refusals where samples do not support them."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import quad

from flowbridge.core.errors import ConvergenceError, MoleculeMismatchError, NonFiniteEnergyError, OverlapError
from flowbridge.core.potential import Particles
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.bennett import weighted_acceptance_ratio
from flowbridge.integrations.pymbar import (
    distance_to_solution,
    free_energy_difference,
    mbar_from_reduced_potentials,
    mbar_from_samples,
)

ATOM = Particles(("A",), (18,), (39.9,))
STIFFNESS = {"soft": 40.0, "stiff": 120.0, "moved": 60.0}
CENTRE = {"soft": 0.0, "stiff": 0.05, "moved": 0.2}


def harmonic(state, x):
    """Reduced potential of an oscillator along x; nm and 1/nm^2."""
    return 0.5 * STIFFNESS[state] * (x - CENTRE[state]) ** 2


def truth(a, b):
    """F_b - F_a of two oscillators in one dimension: half the logarithm of the ratio of stiffnesses."""
    return 0.5 * np.log(STIFFNESS[b] / STIFFNESS[a])


def samples_of(x, states=tuple(STIFFNESS), log_weights=None, particles=ATOM, **changes):
    positions = np.zeros((len(x), 1, 3))
    positions[:, 0, 0] = x
    potentials = {state: harmonic(state, x) for state in states}
    weights = np.zeros(len(x)) if log_weights is None else log_weights
    return WeightedSamples(positions, weights, particles, 300.0, {**potentials, **changes})


def drawn(rng, state, number, **options):
    x = CENTRE[state] + rng.standard_normal(number) / STIFFNESS[state] ** 0.5
    return samples_of(x, **options)


def reweighted(rng, state, number, broadening=1.4):
    """Samples of a broader oscillator with weights to ``state``, and the density they are from as 'generator'."""
    width = broadening / STIFFNESS[state] ** 0.5
    x = CENTRE[state] + width * rng.standard_normal(number)
    generator = 0.5 * ((x - CENTRE[state]) / width) ** 2
    return samples_of(x, log_weights=generator - harmonic(state, x) + 55.0, generator=generator)


class TestHarmonicOscillators:
    def test_two_states(self):
        rng = np.random.default_rng(1)
        result = free_energy_difference(drawn(rng, "soft", 5000), drawn(rng, "stiff", 5000), "soft", "stiff")
        assert abs(result.value - truth("soft", "stiff")) < 3 * result.error
        assert result.error < 0.02

    def test_three_states_and_result(self):
        rng = np.random.default_rng(2)
        sets = {state: drawn(rng, state, number) for state, number in zip(STIFFNESS, (3000, 2000, 4000), strict=True)}
        result = mbar_from_samples(sets, decorrelate=False)
        for a in STIFFNESS:
            for b in STIFFNESS:
                value, error = result.difference(a, b)
                assert abs(value - truth(a, b)) <= 3.5 * error
                assert value == pytest.approx(-result.difference(b, a).value)
        assert dict(zip(result.states, result.counts, strict=True)) == {"soft": 3000, "stiff": 2000, "moved": 4000}
        assert result.overlap.sum(axis=1) == pytest.approx(1.0)
        with pytest.raises(ValueError, match="no state 'hot'"):
            result.difference("soft", "hot")

    def test_error_covers_the_truth(self):
        rng = np.random.default_rng(3)
        pairs = [
            free_energy_difference(drawn(rng, "soft", 300), drawn(rng, "moved", 300), "soft", "moved")
            for _ in range(200)
        ]
        inside = np.mean([abs(p.value - truth("soft", "moved")) < p.error for p in pairs])
        assert 0.58 < inside < 0.78

    def test_state_that_was_not_sampled(self):
        rng = np.random.default_rng(4)
        result = mbar_from_samples({"soft": drawn(rng, "soft", 20_000)}, ["soft", "stiff"])
        value, error = result.difference("soft", "stiff")
        assert abs(value - truth("soft", "stiff")) < 3 * error < 0.1

    def test_normalised_density_against_trajectory_gives_the_partition_function(self):
        """A generator whose density is exact: the free energy is -ln Z of the target."""
        rng = np.random.default_rng(5)
        width = 0.2
        log_q = lambda x: -0.5 * (x / width) ** 2 - np.log(width * (2 * np.pi) ** 0.5)  # noqa: E731
        sets = {}
        for name, x in (
            ("generator", width * rng.standard_normal(4000)),
            ("soft", rng.standard_normal(4000) / STIFFNESS["soft"] ** 0.5),
        ):
            sets[name] = samples_of(x, generator=-log_q(x))
        value, error = mbar_from_samples(sets, ["generator", "soft"]).difference("generator", "soft")
        assert abs(value + 0.5 * np.log(2 * np.pi / STIFFNESS["soft"])) < 3 * error < 0.1


def test_double_well_between_temperatures():
    """A double well at two inverse temperatures, sampled by rejection, against numerical integration."""
    rng = np.random.default_rng(6)

    def potential(x):
        return (x**2 - 1.0) ** 2

    def rejection(beta):
        x = rng.uniform(-3, 3, 200_000)
        return x[rng.random(x.size) < np.exp(-beta * potential(x))][:5000]

    sets = {}
    for name, beta in (("cold", 3.0), ("hot", 1.0)):
        x = rejection(beta)
        sets[name] = samples_of(x, states=(), cold=3.0 * potential(x), hot=1.0 * potential(x))
    integrals = [quad(lambda x, b=b: np.exp(-b * potential(x)), -3, 3)[0] for b in (3.0, 1.0)]
    value, error = mbar_from_samples(sets).difference("cold", "hot")
    assert abs(value + np.log(integrals[1] / integrals[0])) < 3 * error < 0.1


class TestWeightedSamples:
    def test_reweighted_states(self):
        rng = np.random.default_rng(7)
        result = free_energy_difference(reweighted(rng, "soft", 5000), reweighted(rng, "moved", 5000), "soft", "moved")
        assert abs(result.value - truth("soft", "moved")) < 3 * result.error < 0.2

    def test_one_side_weighted(self):
        rng = np.random.default_rng(8)
        result = free_energy_difference(drawn(rng, "soft", 5000), reweighted(rng, "stiff", 5000), "soft", "stiff")
        assert abs(result.value - truth("soft", "stiff")) < 3 * result.error < 0.1

    def test_error_covers_the_truth(self):
        rng = np.random.default_rng(9)
        pairs = [
            free_energy_difference(reweighted(rng, "soft", 400), reweighted(rng, "moved", 400), "soft", "moved")
            for _ in range(300)
        ]
        inside = np.mean([abs(p.value - truth("soft", "moved")) < p.error for p in pairs])
        assert 0.60 < inside < 0.76

    def test_equal_weights_agree_with_pymbar(self):
        rng = np.random.default_rng(10)
        first, second = drawn(rng, "soft", 4000), drawn(rng, "moved", 1500)
        gaps = [s.reduced_potentials["moved"] - s.reduced_potentials["soft"] for s in (first, second)]
        own = weighted_acceptance_ratio(*gaps, np.full(4000, 3.0), np.zeros(1500), replicas=4000)
        pymbars = mbar_from_samples({"soft": first, "moved": second}, ["soft", "moved"], decorrelate=False)
        assert own.value == pytest.approx(pymbars.difference("soft", "moved").value, abs=1e-6)
        assert own.error == pytest.approx(pymbars.difference("soft", "moved").error, rel=0.25)

    def test_samples_that_are_impossible_in_the_other_state(self):
        """A wall at zero in the other state: exactly half of the states' configurations are cut off."""
        rng = np.random.default_rng(11)
        x = rng.standard_normal(20_000)
        gaps = np.where(x > 0, 0.0, np.inf)
        result = weighted_acceptance_ratio(gaps, np.zeros(5000), np.zeros(20_000), np.zeros(5000))
        assert abs(result.value - np.log(2)) < 3 * result.error < 0.1

    def test_weights_without_weight_may_have_no_energy(self):
        gaps, log_weights = np.array([0.1, np.nan, -0.1] * 20), np.array([0.0, -np.inf, 0.0] * 20)
        result = weighted_acceptance_ratio(gaps, np.zeros(60), log_weights, np.zeros(60))
        assert np.isfinite(result.value)
        with pytest.raises(NonFiniteEnergyError, match="20 samples with weight"):
            weighted_acceptance_ratio(gaps, np.zeros(60), np.zeros(60), np.zeros(60))


class TestRefusals:
    def test_disjoint_states_are_refused_with_the_overlap(self):
        rng = np.random.default_rng(12)
        states = [drawn(rng, "soft", 500), samples_of(3.0 + rng.standard_normal(500) / 10)]
        for part in states:
            x = part.positions[:, 0, 0]
            part.reduced_potentials["far"] = 50.0 * (x - 3.0) ** 2
        with pytest.raises(OverlapError, match=r"'far'.*'soft'.*needed: 0\.03"):
            free_energy_difference(*states, "soft", "far")
        weighted = [
            WeightedSamples(p.positions, rng.normal(size=500), ATOM, 300.0, p.reduced_potentials) for p in states
        ]
        with pytest.raises(OverlapError, match=r"overlap matrix \(needed: 0\.03\)"):
            free_energy_difference(*weighted, "soft", "far")

    def test_poor_overlap_is_refused_although_pymbar_answers(self):
        """Eight widths apart pymbar returns a number whose error, of some kT, is itself a guess."""
        rng = np.random.default_rng(13)
        x = np.concatenate([rng.standard_normal(1000), 8 + rng.standard_normal(1000)])
        energies = np.stack([0.5 * x**2, 0.5 * (x - 8) ** 2])
        with pytest.raises(OverlapError, match=r"'left'.*'right'"):
            mbar_from_reduced_potentials(energies, [1000, 1000], ["left", "right"])
        answer = mbar_from_reduced_potentials(energies, [1000, 1000], minimum_overlap=0.0)
        assert answer.errors[0, 1] > 1

    def test_a_chain_of_states_connects_distant_ends(self):
        rng = np.random.default_rng(14)
        centres = np.arange(0.0, 11.0, 2.0)
        x = np.concatenate([c + rng.standard_normal(1000) for c in centres])
        energies = 0.5 * (x - centres[:, None]) ** 2
        result = mbar_from_reduced_potentials(energies, [1000] * 6)
        assert result.overlap[0, 5] < 1e-4
        assert abs(result.free_energies[0, 5]) < 3 * result.errors[0, 5] < 1.0
        keep = np.delete(np.arange(6), 3)
        rows = np.concatenate([np.arange(1000) + 1000 * k for k in keep])
        with pytest.raises(OverlapError, match=r"\['0', '1', '2'\] do not overlap with \['3', '4'\]"):
            mbar_from_reduced_potentials(energies[np.ix_(keep, rows)], [1000] * 5, minimum_overlap=0.1)

    def test_an_unsampled_state_far_away_is_refused(self):
        x = np.random.default_rng(15).standard_normal(1000)
        with pytest.raises(OverlapError, match=r"state 'far' was not sampled.*needed: 50"):
            mbar_from_reduced_potentials(np.stack([0.5 * x**2, 0.5 * (x - 5) ** 2]), [1000, 0], ["here", "far"])
        with pytest.raises(OverlapError, match="'never' was not sampled"):
            mbar_from_reduced_potentials(np.stack([0.5 * x**2, np.full(1000, np.inf)]), [1000, 0], ["here", "never"])

    def test_an_unconverged_solution_is_refused(self):
        rng = np.random.default_rng(16)
        x = np.concatenate([rng.standard_normal(500), 2 + 0.3 * rng.standard_normal(100)])
        energies = np.stack([0.5 * x**2, 0.5 * ((x - 2) / 0.3) ** 2])
        with pytest.raises(ConvergenceError, match="kT from its solution"):
            mbar_from_reduced_potentials(energies, [500, 100], maximum_iterations=1)
        assert mbar_from_reduced_potentials(energies, [500, 100]).free_energies[0, 1] > 0

    def test_distance_to_solution_measures_the_error(self):
        rng = np.random.default_rng(17)
        x = np.concatenate([rng.standard_normal(500), 1 + rng.standard_normal(800)])
        energies, counts = np.stack([0.5 * x**2, 0.5 * (x - 1) ** 2]), np.array([500, 800])
        solution = mbar_from_reduced_potentials(energies, counts).free_energies[0]
        assert distance_to_solution(energies, counts, solution) < 1e-6
        off = distance_to_solution(energies, counts, solution + np.array([0.0, 0.05]))
        assert off == pytest.approx(0.05, rel=0.05)

    def test_weights_betray_a_wrong_name(self):
        rng = np.random.default_rng(18)
        weighted = reweighted(rng, "soft", 500)
        plain = drawn(rng, "stiff", 500)
        with pytest.raises(ValueError, match=r"weights.*for 'moved' lead to \['soft'\]"):
            free_energy_difference(weighted, plain, "moved", "stiff")
        with pytest.raises(ValueError, match="'soft' carry weights that do not lead from 'soft'"):
            mbar_from_samples({"soft": weighted})
        assert mbar_from_samples({"generator": weighted}, ["generator", "soft"]).states == ("generator", "soft")

    def test_copies_are_refused(self):
        rng = np.random.default_rng(19)
        copies = reweighted(rng, "soft", 500).resample(500, seed=1)
        with pytest.raises(ValueError, match="copies of each other"):
            free_energy_difference(copies, drawn(rng, "stiff", 500), "soft", "stiff")
        with pytest.raises(ValueError, match="copies of each other"):
            mbar_from_samples({"soft": copies})

    def test_missing_and_mismatched(self):
        rng = np.random.default_rng(20)
        soft, stiff = drawn(rng, "soft", 100), drawn(rng, "stiff", 100)
        with pytest.raises(ValueError, match=r"no reduced potential \['hot'\]"):
            free_energy_difference(soft, stiff, "soft", "hot")
        with pytest.raises(ValueError, match="both states are 'soft'"):
            free_energy_difference(soft, stiff, "soft", "soft")
        with pytest.raises(ValueError, match="'hot' must be among"):
            mbar_from_samples({"hot": soft})
        with pytest.raises(ValueError, match="no samples"):
            mbar_from_samples({})
        other = drawn(rng, "stiff", 100, particles=Particles(("B",), (10,), (20.2,)))
        with pytest.raises(MoleculeMismatchError):
            free_energy_difference(soft, other, "soft", "stiff")

    @pytest.mark.parametrize(
        ("energies", "counts", "error", "message"),
        [
            ([[0.0, np.nan], [0.0, 0.0]], [1, 1], NonFiniteEnergyError, "first is nan for sample 1 in state '0'"),
            ([[0.0, np.inf], [0.0, np.inf]], [1, 1], NonFiniteEnergyError, "inf for sample 1 in state '1'"),
            ([[0.0, 0.0], [0.0, 0.0]], [1, 2], ValueError, "do not add up to the 2 samples"),
            ([[0.0, 0.0]], [1, 1], ValueError, r"\(1, 2\)"),
        ],
    )
    def test_bad_problems(self, energies, counts, error, message):
        with pytest.raises(error, match=message):
            mbar_from_reduced_potentials(energies, counts)

    def test_names_must_differ(self):
        with pytest.raises(ValueError, match="different names"):
            mbar_from_reduced_potentials(np.zeros((2, 2)), [1, 1], ["a", "a"])


def test_correlated_samples_are_thinned_out():
    """A slow chain: without thinning the error is several times too small."""
    rng = np.random.default_rng(21)
    x = np.empty(20_000)
    x[0] = 0.0
    for t in range(1, x.size):
        x[t] = 0.95 * x[t - 1] + np.sqrt((1 - 0.95**2) / STIFFNESS["soft"]) * rng.standard_normal()
    sets = {"soft": samples_of(x), "stiff": drawn(rng, "stiff", 20_000)}
    thinned = mbar_from_samples(sets, ["soft", "stiff"])
    naive = mbar_from_samples(sets, ["soft", "stiff"], decorrelate=False)
    assert thinned.counts[0] < 4000
    assert thinned.counts[1] > 15_000
    assert thinned.errors[0, 1] > 1.5 * naive.errors[0, 1]
    assert abs(thinned.free_energies[0, 1] - truth("soft", "stiff")) < 3 * thinned.errors[0, 1]


def test_the_global_random_numbers_of_numpy_are_left_alone():
    """pymbar alone reseeds them with every solution."""
    rows = [[0.0, 1.0] * 9, [1.0, 0.0] * 9]
    drawn_after = []
    for solve in (lambda: None, lambda: mbar_from_reduced_potentials(rows, [9, 9])):
        np.random.seed(7)  # noqa: NPY002
        solve()
        drawn_after.append(np.random.random())  # noqa: NPY002
    assert drawn_after[0] == drawn_after[1]


def test_import_is_silent_and_leaves_numpy_and_loggers_alone():
    code = (
        "import logging, numpy; before = numpy.geterr(); logging.getLogger('pymbar').setLevel(25);"
        "import flowbridge.integrations.pymbar as adapter;"
        "adapter.mbar_from_reduced_potentials([[0., 1.] * 9, [1., 0.] * 9], [9, 9]);"
        "print(numpy.geterr() == before, logging.getLogger('pymbar').level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "25"]
    assert done.stderr == ""
