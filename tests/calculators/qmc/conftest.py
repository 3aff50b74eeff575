"""Molecules and trial functions that several tests share."""

import pytest
import torch

from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings, trial_wave_function

pyscf = pytest.importorskip("pyscf")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Small matrices: threads that wait for each other on a busy machine cost ten times the work.
    before = torch.get_num_threads(), pyscf.lib.num_threads()
    torch.set_num_threads(1)
    pyscf.lib.num_threads(1)
    yield
    torch.set_num_threads(before[0])
    pyscf.lib.num_threads(before[1])


@pytest.fixture(scope="session")
def h2():
    return Molecule.build([1, 1], [[0, 0, 0], [0, 0, 1.4]])


@pytest.fixture(scope="session")
def lih():
    return Molecule.build([3, 1], [[0, 0, 0], [0, 0, 3.015]])


@pytest.fixture(scope="session")
def h2_trial(h2):
    return trial_wave_function(h2, TrialSettings(grid_level=3))


@pytest.fixture(scope="session")
def h2_determinant(h2):
    return trial_wave_function(h2, TrialSettings(orbitals="hartree-fock", jastrow=False, grid_level=3))


@pytest.fixture(scope="session")
def lih_determinant(lih):
    return trial_wave_function(
        lih, TrialSettings(orbitals="hartree-fock", basis="cc-pvdz", jastrow=False, grid_level=2)
    )


@pytest.fixture
def shake():
    """Random parameters for a wave function, so that no term is tested at zero."""

    def shaken(wave_function, size=0.05, seed=0):
        generator = torch.Generator().manual_seed(seed)
        counts = wave_function.parameter_counts
        step = size * torch.randn(sum(counts), generator=generator, dtype=torch.float64)
        step[counts[0] :] *= 0.4
        return wave_function.stepped(step)

    return shaken


@pytest.fixture
def electrons():
    """Positions (W, N, 3) around the origin."""

    def drawn(wave_function, walkers=4, seed=0):
        """Those of many that lie far from nodes and nuclei, where finite differences mean something."""
        generator = torch.Generator().manual_seed(seed)
        electrons = wave_function.molecule.electrons
        positions = 1.2 * torch.randn(16 * walkers, electrons, 3, generator=generator, dtype=torch.float64)
        steepness = wave_function.evaluate(positions).gradient.abs().amax((1, 2))
        return positions[steepness.argsort()[:walkers]]

    return drawn
