"""Batched energies of a System."""

import numpy as np
import pytest
from flowbridge.core.errors import ConfigurationError
from flowbridge.integrations.openmm.energies import OpenMMEnergy, Plan
from openmm import app
from openmm_contexts import context_of, evaluate


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path))


@pytest.fixture(scope="module", params=[("amber96.xml", "amber96_obc.xml"), ("amber96.xml", "implicit/obc1.xml")])
def system(alanine, request):
    return app.ForceField(*request.param).createSystem(alanine.topology)


@pytest.mark.parametrize(("platform", "tolerance"), [("Reference", 1e-12), ("CPU", 1e-5), (None, 1e-5)])
@pytest.mark.parametrize("workers", [1, 3, None])
def test_same_as_one_by_one(system, alanine, platform, tolerance, workers):
    positions = alanine.shaken(50, 0.01)
    energies, forces = OpenMMEnergy(system, platform, workers).energies_and_forces(positions)
    context = context_of(system)
    expected, expected_forces = map(np.array, zip(*(evaluate(context, frame) for frame in positions), strict=True))
    np.testing.assert_allclose(energies, expected, rtol=tolerance)
    np.testing.assert_allclose(forces, expected_forces, rtol=0, atol=tolerance * np.abs(expected_forces).max())


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_evaluated_is_not_a_number(system, alanine, workers):
    positions = alanine.shaken(40, 0.01)
    positions[3, 4, 1], positions[17, 0, 0] = np.nan, np.inf
    energies, forces = OpenMMEnergy(system, "Reference", workers).energies_and_forces(positions)
    bad = np.isnan(energies)
    assert np.flatnonzero(bad).tolist() == [3, 17]
    assert np.isnan(forces[bad]).all()
    assert np.isfinite(forces[~bad]).all()


def test_nothing_usable_in_the_first_call(system, alanine):
    energy = OpenMMEnergy(system)
    energies, _ = energy.energies_and_forces(np.full((4, 22, 3), np.nan))
    assert np.isnan(energies).all()
    assert energy.energies_and_forces(alanine.shaken(0))[0].shape == (0,)


def test_the_plan_is_remembered(system, alanine, monkeypatch):
    first = OpenMMEnergy(system)
    assert first.plan is None
    first.energies_and_forces(alanine.shaken(20))
    assert isinstance(first.plan, Plan)

    def tried(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr("flowbridge.integrations.openmm.energies._seconds", tried)
    again = OpenMMEnergy(system)
    again.energies_and_forces(alanine.shaken(20))
    assert again.plan == first.plan
    other = app.ForceField("amber96.xml").createSystem(alanine.topology)
    with pytest.raises(AssertionError, match="tried again"):
        OpenMMEnergy(other).energies_and_forces(alanine.shaken(20))


def test_a_cache_that_cannot_be_written_to(system, alanine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("FLOWBRIDGE_CACHE", str(tmp_path / "file"))
    assert np.isfinite(OpenMMEnergy(system).energies_and_forces(alanine.shaken(20))[0]).all()


def test_bad_arguments(system, alanine):
    with pytest.raises(ConfigurationError, match=r"\(2, 21, 3\), expected \(configurations, 22, 3\)"):
        OpenMMEnergy(system).energies_and_forces(alanine.shaken(2)[:, :21])
    with pytest.raises(ConfigurationError, match="workers must be at least 1, got 0"):
        OpenMMEnergy(system, workers=0)
