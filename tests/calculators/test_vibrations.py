"""Lowest vibrations: of a molecule whose frequency is known, at a minimum and at a saddle, moved and turned."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.units import J as joule
from ase.units import _hbar, invcm, kg, m

from flowbridge.calculators.vibrations import lowest_frequency

EPSILON, SIGMA = 0.5, 1.0
REST = SIGMA * 2 ** (1 / 6)


def cluster(positions):
    return Atoms("Ar" * len(positions), positions, calculator=LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=50.0))


def test_two_atoms_vibrate_as_their_spring_says():
    spring = 72.0 * EPSILON / (2 ** (1 / 3) * SIGMA**2)
    reduced = cluster([[0, 0, 0], [0, 0, 1]]).get_masses()[0] / 2
    expected = _hbar * m * np.sqrt(joule * kg) * np.sqrt(spring / reduced) / invcm
    assert lowest_frequency(cluster([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0 + REST]])) == pytest.approx(expected, rel=1e-3)


def test_a_triangle_is_a_minimum_and_a_line_is_none():
    triangle = REST * np.array([[0, 0, 0], [1, 0, 0], [0.5, np.sqrt(0.75), 0]])
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    assert lowest_frequency(cluster(triangle)) > 50.0
    assert lowest_frequency(cluster(triangle @ turn + 3.0)) == pytest.approx(
        lowest_frequency(cluster(triangle)), rel=1e-3
    )
    rest = 0.998 * REST  # the outer atoms pull each other in
    assert lowest_frequency(cluster([[-rest, 0, 0], [0, 0, 0], [rest, 0, 0]])) < -10.0
