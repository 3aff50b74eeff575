"""The structure-based model of chignolin, the Fourier bias, slow coordinates and native contacts."""

from pathlib import Path

import numpy as np
import openmm
import pytest

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.beads.native_contacts import NativeContacts, contact_map, transitions
from flowbridge.integrations.deeptime import SlowCoordinates, pair_distances
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_langevin
from flowbridge.integrations.openmm.sampling.fourier_bias import BIAS_GROUP, FourierBias
from flowbridge.integrations.openmm.sampling.torsion_bias import torsion_angles
from flowbridge.integrations.openmm.systems.go_model import GoModel

STRUCTURE = Path(__file__).parents[2] / "examples" / "chignolin_cln025.pdb"


def energy_at(system, positions):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


@pytest.fixture(scope="module")
def model():
    return GoModel.from_structure(STRUCTURE, 1.75, 0.7, 2.0)


@pytest.fixture(scope="module")
def folding_run(model):
    """A tenth of a microsecond from the native structure."""
    xml = openmm.XmlSerializer.serialize(model.system())
    return run_langevin(LangevinRun(xml, model.native, 300.0, 0.01, 1.0, 1000, 100, 3000, 5, None))


class TestGoModel:
    def test_the_native_structure_is_a_minimum(self, model):
        """Of all terms but the repulsion of what is no contact, which the native structure hardly feels."""
        energy, forces = energy_at(model.system(), model.native)
        contacts = len(model.contacts) * 2.0 * 1.75
        assert abs(energy + contacts) < 0.1 * contacts
        assert np.abs(forces).max() < 10.0  # kJ/mol/nm; a stretched bond has a thousand

    def test_the_sequence_is_that_of_cln025(self, model):
        assert model.beads.residue_names == ("TYR", "TYR", "ASP", "PRO", "GLU", "THR", "GLY", "THR", "TRP", "TYR")
        lengths = np.linalg.norm(np.diff(model.native, axis=0), axis=1)
        assert np.allclose(lengths, 0.38, atol=0.01)

    def test_it_folds_and_unfolds(self, model, folding_run):
        contacts = NativeContacts.of(model.native, 0.7)
        fraction = contacts.fraction(folding_run.positions)
        assert transitions(fraction, 0.25, 0.75) >= 4
        assert 0.1 < (fraction > 0.5).mean() < 0.9

    def test_bad_structures(self, tmp_path):
        with pytest.raises(ConfigurationError, match="does not exist"):
            GoModel.from_structure(tmp_path / "none.pdb", 1.0)
        with pytest.raises(ConfigurationError, match="no contacts within"):
            GoModel.from_structure(STRUCTURE, 1.0, 0.2)
        short = "\n".join(STRUCTURE.read_text().splitlines()[:5]) + "\nEND\n"
        (tmp_path / "short.pdb").write_text(short)
        with pytest.raises(ConfigurationError, match="3 alpha carbons"):
            GoModel.from_structure(tmp_path / "short.pdb", 1.0)


class TestNativeContacts:
    def test_the_native_structure_has_all(self, model):
        contacts = NativeContacts.of(model.native, 0.7)
        assert {tuple(pair) for pair in contacts.pairs} == set(model.contacts)
        assert contacts.fraction(model.native[None])[0] > 0.97
        assert contacts.fraction(5.0 * model.native[None])[0] < 1e-6

    def test_no_contacts(self, model):
        with pytest.raises(ConfigurationError, match="no contacts"):
            NativeContacts.of(model.native, 0.1)

    def test_contact_map(self):
        frames = np.zeros((4, 3, 3))
        frames[:, 1, 0], frames[:, 2, 0] = 0.3, [0.4, 0.4, 2.0, 2.0]
        found = contact_map(frames, 0.5)
        assert np.allclose(found, [[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]])

    def test_transitions(self):
        values = np.array([0.5, 0.1, 0.5, 0.9, 0.6, 0.9, 0.1, 0.3, 0.1])
        assert transitions(values, 0.25, 0.75) == 2


class TestFourierBias:
    def test_openmm_and_the_formula_agree(self, alanine):
        torsion = (4, 6, 8, 14)
        grid = np.cos(np.linspace(-np.pi, np.pi, 73)) * 3.0 + np.sin(2 * np.linspace(-np.pi, np.pi, 73))
        bias = FourierBias.fit(torsion, grid, 3)
        assert np.allclose(bias.cosines, [3.0, 0.0, 0.0], atol=1e-12)
        assert np.allclose(bias.sines, [0.0, 1.0, 0.0], atol=1e-12)
        system = openmm.System()
        for mass in alanine.particles.masses:
            system.addParticle(mass)
        assert bias.add_to(system).getForceGroup() == BIAS_GROUP
        for positions in alanine.shaken(3, 0.03):
            energy, _ = energy_at(system, positions)
            assert np.isclose(energy, bias.energies(positions[None])[0], atol=1e-9)

    def test_too_many_harmonics(self):
        with pytest.raises(ConfigurationError, match="cannot tell 9 harmonics apart"):
            FourierBias.fit((0, 1, 2, 3), np.zeros(11), 9)


class TestSlowCoordinates:
    def test_folding_is_the_slow_motion(self, model, folding_run):
        pytest.importorskip("deeptime", reason="deeptime is not installed: pip install deeptime")
        slow = SlowCoordinates.fit([folding_run.positions], lag=10)
        found = slow(folding_run.positions)
        fraction = NativeContacts.of(model.native, 0.7).fraction(folding_run.positions)
        assert abs(np.corrcoef(found[:, 0], fraction)[0, 1]) > 0.5
        assert slow.timescales[0] > slow.timescales[1] > 0.0
        assert abs(found.mean(0)).max() < 0.3

    def test_too_short(self, model):
        pytest.importorskip("deeptime", reason="deeptime is not installed: pip install deeptime")
        with pytest.raises(ConfigurationError, match="longer than the lag"):
            SlowCoordinates.fit([np.zeros((5, 4, 3))], lag=5)

    def test_pair_distances(self):
        frame = np.array([[[0.0, 0, 0], [3.0, 0, 0], [0, 4.0, 0]]])
        assert np.allclose(pair_distances(frame), [[3.0, 4.0, 5.0]])


def test_torsion_signs_agree_with_the_model(model):
    """The phases of the model's torsions are those of the native angles: a mirror image has a higher energy."""
    mirrored = model.native * [1.0, 1.0, -1.0]
    assert energy_at(model.system(), mirrored)[0] > energy_at(model.system(), model.native)[0] + 5.0
    assert torsion_angles(model.native, (0, 1, 2, 3)) == pytest.approx(-torsion_angles(mirrored, (0, 1, 2, 3)))
