"""Weighted samples: statistics, selection, files, and exports into the real packages."""

import ase.io
import h5py
import mdtraj
import numpy as np
import openmm
import pandas
import pytest
from ase.units import Angstrom, nm
from openmm import unit

from flowbridge.core import sample_files
from flowbridge.core.errors import (
    ConfigurationError,
    FlowbridgeError,
    MoleculeMismatchError,
    NonFiniteEnergyError,
    OverlapError,
)
from flowbridge.core.potential import Particles
from flowbridge.core.sample_files import SampleFileError
from flowbridge.core.samples import WeightedSamples

WATER = Particles(
    names=("O", "H1", "H2", "CG"),
    atomic_numbers=(8, 1, 1, 0),
    masses=(15.999, 3.0, 3.0, 72.0),
    bonds=((0, 1), (0, 2)),
    residue_names=("HOH", "HOH", "HOH", "BEA"),
    residue_indices=(0, 0, 0, 1),
)


def make(samples=200, seed=0, dtype=np.float64, **changes):
    """Samples of N(0, 0.11^2) in every coordinate, weighted to N(0, 0.1^2)."""
    rng = np.random.default_rng(seed)
    positions = (0.11 * rng.standard_normal((samples, 4, 3))).astype(dtype)
    target = (positions.astype(float) ** 2).sum((1, 2)) / (2 * 0.1**2)
    generator = (positions.astype(float) ** 2).sum((1, 2)) / (2 * 0.11**2)
    arguments = {
        "positions": positions,
        "log_weights": generator - target,
        "reduced_potentials": {"target": target, "generator": generator},
        "particles": WATER,
        "temperature": 310.0,
        "provenance": {"seed": seed, "target": "harmonic, µ"},
    }
    return WeightedSamples(**{**arguments, **changes})


def equal(first, second):
    return (
        np.array_equal(first.positions, second.positions)
        and first.positions.dtype == second.positions.dtype
        and np.array_equal(first.log_weights, second.log_weights)
        and first.reduced_potentials.keys() == second.reduced_potentials.keys()
        and all(np.array_equal(u, second.reduced_potentials[k]) for k, u in first.reduced_potentials.items())
        and first.particles == second.particles
        and first.temperature == second.temperature
        and first.provenance == second.provenance
    )


class TestMeaning:
    def test_average_recovers_the_target(self):
        samples = make(20_000)
        estimate = samples.average(lambda x: (x**2).sum((1, 2)))
        assert abs(estimate.value - 12 * 0.1**2) < 3 * estimate.error
        assert estimate.error < 0.003
        unweighted = (samples.positions**2).sum((1, 2)).mean()
        assert abs(unweighted - 12 * 0.1**2) > 5 * estimate.error

    def test_average_of_arrays(self):
        samples = make(2000)
        estimate = samples.average(samples.positions)
        assert estimate.value.shape == estimate.error.shape == (4, 3)
        assert np.abs(estimate.value / estimate.error).max() < 4.5

    def test_effective_sample_size(self):
        samples = make(50_000)
        # int p^2/q for one coordinate, to the twelfth power
        ratio = 1.1**2 / np.sqrt(2 * 1.1**2 - 1)
        assert samples.effective_sample_percent() == pytest.approx(100 * ratio**-12, rel=0.02)
        assert samples.effective_sample_size() == pytest.approx(samples.effective_sample_percent() * 500)
        assert samples.weights.sum() == pytest.approx(1.0)

    def test_free_energy_difference_by_mask_and_by_function(self):
        samples = make(20_000)

        def outside(positions):
            return positions[:, 0, 0] > 0.1

        by_function = samples.free_energy_difference(lambda x: x[:, 0, 0] <= 0.1, outside)
        mask = outside(samples.positions)
        assert by_function == samples.free_energy_difference(~mask, mask)
        truth = -np.log(0.158655 / 0.841345)
        assert abs(by_function.value - truth) < 3 * by_function.error < 0.3

    def test_free_energy_difference_refuses_an_empty_region(self):
        with pytest.raises(OverlapError, match="region B holds 0 of 200"):
            make().free_energy_difference(lambda x: x[:, 0, 0] < 5, lambda x: x[:, 0, 0] > 5)

    def test_profile(self):
        profile = make(20_000).free_energy_profile(lambda x: x[:, 1, 2], np.linspace(-0.6, 0.6, 25))
        middle = np.abs(profile.centers) < 0.2
        difference = profile.free_energy[middle] - profile.centers[middle] ** 2 / (2 * 0.1**2)
        assert np.abs(difference - difference.mean()).max() < 0.25

    def test_observable_of_wrong_length_is_refused(self):
        with pytest.raises(ValueError, match="one value for each of 200"):
            make().average(np.zeros(199))
        with pytest.raises(ValueError, match="one value for each of 200"):
            make().average(lambda x: x.mean())


class TestConstruction:
    def test_float32_stays_and_integers_become_float64(self):
        assert make(dtype=np.float32).positions.dtype == np.float32
        integers = WeightedSamples(np.zeros((2, 4, 3), dtype=int), np.zeros(2), WATER, 300.0)
        assert integers.positions.dtype == np.float64

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"positions": np.zeros((200, 5, 3))}, ValueError, r"\(200, 4, 3\).*\(200, 5, 3\)"),
            ({"positions": np.full((200, 4, 3), np.nan)}, ValueError, "200 of 200 configurations"),
            ({"temperature": -3.0}, ValueError, "temperature"),
            ({"provenance": {"model": object()}}, ConfigurationError, "plain JSON"),
            ({"provenance": {"ess": float("nan")}}, ConfigurationError, "plain JSON"),
            (
                {"reduced_potentials": {"target": np.zeros(3), "generator": np.zeros(200)}},
                ValueError,
                r"'target' must be of shape \(200,\)",
            ),
        ],
    )
    def test_refusals(self, changes, error, message):
        with pytest.raises(error, match=message):
            make(**changes)

    def test_nan_energies_are_refused_unless_they_weigh_nothing(self):
        potentials = {"target": np.array([1.0, np.nan]), "generator": np.array([0.5, 0.5])}
        arguments = np.zeros((2, 4, 3)), np.zeros(2), WATER, 300.0
        with pytest.raises(NonFiniteEnergyError, match=r"'target' is NaN or -inf for 1 of 2 .* index 1"):
            WeightedSamples(*arguments, potentials)
        given_up = WeightedSamples(arguments[0], [0.0, -np.inf], WATER, 300.0, potentials)
        assert given_up.effective_sample_percent() == pytest.approx(50.0)

    def test_log_weights_are_checked(self):
        for bad in ([0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf], []):
            with pytest.raises(ValueError, match=r"log[-_]weights"):
                WeightedSamples(np.zeros((2, 4, 3)), bad, WATER, 300.0)


class TestSelection:
    def test_subset_keeps_everything_together(self):
        samples = make()
        mask = samples.positions[:, 0, 0] > 0
        picked = samples.subset(mask)
        assert len(picked) == mask.sum()
        assert np.array_equal(picked.positions, samples.positions[mask])
        expected = samples.reduced_potentials["target"][mask]
        assert np.array_equal(picked.reduced_potentials["target"], expected)
        assert equal(samples.subset(slice(3, 9)), samples.subset(np.arange(3, 9)))
        with pytest.raises(IndexError):
            samples.subset([500])
        with pytest.raises(ValueError, match="non-empty"):
            samples.subset(slice(0, 0))

    def test_concatenation_is_the_inverse_of_slicing(self):
        samples = make()
        halves = [samples.subset(slice(0, 77)), samples.subset(slice(77, None))]
        assert equal(WeightedSamples.concatenate(halves), samples)

    def test_concatenation_keeps_both_provenances(self):
        joined = WeightedSamples.concatenate([make(50, seed=1), make(60, seed=2)])
        assert len(joined) == 110
        assert [p["seed"] for p in joined.provenance["concatenated"]] == [1, 2]

    def test_concatenation_refuses_what_does_not_belong_together(self):
        samples = make()
        others = Particles(("A",) * 4, (6,) * 4, (12.0,) * 4)
        with pytest.raises(MoleculeMismatchError):
            WeightedSamples.concatenate([samples, make(particles=others)])
        with pytest.raises(ValueError, match=r"300\.0 K"):
            WeightedSamples.concatenate([samples, make(temperature=300.0)])
        without = WeightedSamples(samples.positions, samples.log_weights, WATER, 310.0)
        with pytest.raises(ValueError, match="reduced potentials"):
            WeightedSamples.concatenate([samples, without])
        with pytest.raises(ValueError, match="no samples"):
            WeightedSamples.concatenate([])

    @pytest.mark.parametrize("shift", ["constant", "equal weights"])
    def test_concatenation_refuses_weights_on_another_scale(self, shift):
        """A weight shifted by its own maximum is fine alone and wrong beside others."""
        samples, other = make(seed=1), make(seed=2)
        log_weights = other.log_weights - 7.0 if shift == "constant" else np.zeros(len(other))
        shifted = WeightedSamples(other.positions, log_weights, WATER, 310.0, other.reduced_potentials)
        with pytest.raises(ValueError, match="not on one scale"):
            WeightedSamples.concatenate([samples, shifted])

    def test_resampling_is_systematic(self):
        samples = make(300)
        drawn = samples.resample(1000, seed=4)
        assert np.array_equal(drawn.log_weights, np.zeros(1000))
        index = {x.tobytes(): i for i, x in enumerate(samples.positions)}
        copies = np.bincount([index[x.tobytes()] for x in drawn.positions], minlength=300)
        assert (np.abs(copies - 1000 * samples.weights) < 1).all()
        assert drawn.provenance["resampled"]["samples"] == 300
        assert equal(samples.resample(1000, seed=4), drawn)
        assert not equal(samples.resample(1000, seed=5), drawn)

    def test_resampling_never_picks_zero_weights(self):
        log_weights = np.full(50, -np.inf)
        log_weights[[7, 20]] = 0.0
        samples = WeightedSamples(np.arange(600.0).reshape(50, 4, 3), log_weights, WATER, 300.0)
        for seed in range(20):
            assert set(samples.resample(9, seed).positions[:, 0, 0]) == {84.0, 240.0}

    def test_resampled_average_is_unbiased(self):
        samples = make(500)
        target = samples.average(lambda x: x[:, 0, 0] ** 2).value
        means = [np.mean(samples.resample(100, seed).positions[:, 0, 0] ** 2) for seed in range(300)]
        assert np.mean(means) == pytest.approx(target, abs=4 * np.std(means) / 300**0.5)

    def test_resampling_needs_a_number(self):
        with pytest.raises(ValueError, match="0 samples"):
            make().resample(0, seed=1)


class TestFiles:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_round_trip_is_exact(self, tmp_path, dtype):
        samples = make(dtype=dtype)
        samples.save(tmp_path / "samples.h5")
        assert equal(WeightedSamples.load(tmp_path / "samples.h5"), samples)
        assert [p.name for p in tmp_path.iterdir()] == ["samples.h5"]

    def test_zero_weights_and_infinite_energies_survive(self, tmp_path):
        potentials = {"target": np.array([1.0, np.inf]), "generator": np.array([0.5, 0.5])}
        weights = potentials["generator"] - potentials["target"]
        samples = make(positions=np.zeros((2, 4, 3)), reduced_potentials=potentials, log_weights=weights)
        samples.save(tmp_path / "samples.h5")
        assert equal(WeightedSamples.load(tmp_path / "samples.h5"), samples)

    def test_single_precision_is_smaller_and_keeps_the_weights(self, tmp_path):
        samples = make(5000)
        samples.save(tmp_path / "double.h5")
        samples.save(tmp_path / "single.h5", single_precision=True)
        loaded = WeightedSamples.load(tmp_path / "single.h5")
        assert loaded.positions.dtype == np.float32
        assert np.abs(loaded.positions - samples.positions).max() < 1e-7
        assert np.array_equal(loaded.log_weights, samples.log_weights)
        assert (tmp_path / "single.h5").stat().st_size < 0.6 * (tmp_path / "double.h5").stat().st_size

    def test_mdtraj_opens_it(self, tmp_path):
        samples = make()
        samples.save(tmp_path / "samples.h5")
        for trajectory in (
            mdtraj.load(tmp_path / "samples.h5"),
            mdtraj.load_hdf5(str(tmp_path / "samples.h5")),
        ):
            assert np.array_equal(trajectory.xyz, samples.positions.astype(np.float32))
            assert trajectory.topology == samples.to_mdtraj().topology
        assert mdtraj.load(tmp_path / "samples.h5", stride=50).n_frames == 4
        assert mdtraj.load_frame(tmp_path / "samples.h5", 7).xyz[0] == pytest.approx(samples.positions[7])
        with mdtraj.formats.HDF5TrajectoryFile(str(tmp_path / "samples.h5")) as file:
            assert file.application == "flowbridge"

    def test_alanine_dipeptide_keeps_its_residues(self, tmp_path, alanine):
        samples = WeightedSamples(alanine.shaken(10), np.zeros(10), alanine.particles, 300.0)
        samples.save(tmp_path / "alanine.h5")
        trajectory = mdtraj.load(tmp_path / "alanine.h5")
        assert [str(r) for r in trajectory.topology.residues] == ["ACE1", "ALA2", "NME3"]
        assert trajectory.topology.n_bonds == 21
        assert mdtraj.compute_phi(trajectory)[1].shape == (10, 1)
        assert trajectory.topology.select("element C").size == 6

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        old, new = make(seed=1), make(seed=2)
        path = tmp_path / "samples.h5"
        old.save(path)

        def fails(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(sample_files, "_user_block", fails)
        with pytest.raises(KeyboardInterrupt):
            new.save(path)
        monkeypatch.undo()
        assert equal(WeightedSamples.load(path), old)
        assert [p.name for p in tmp_path.iterdir()] == ["samples.h5"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.h5"):
            WeightedSamples.load(tmp_path / "nothing.h5")

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
    def test_truncated_files_are_refused(self, tmp_path, share):
        path = tmp_path / "samples.h5"
        make().save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(SampleFileError, match=r"samples\.h5 (does not match its digest|is no file of weighted)"):
            WeightedSamples.load(path)

    def test_foreign_files_are_refused_with_the_reason(self, tmp_path):
        text = tmp_path / "text.h5"
        text.write_text("no HDF5 at all")
        with pytest.raises(SampleFileError, match=r"text\.h5 is no file of weighted samples"):
            WeightedSamples.load(text)
        plain = tmp_path / "plain.h5"
        make().to_mdtraj().save(str(plain))
        with pytest.raises(SampleFileError, match="if it is a trajectory, open it with mdtraj"):
            WeightedSamples.load(plain)
        with h5py.File(tmp_path / "empty.h5", "w"):
            pass
        with pytest.raises(SampleFileError, match="holds no weighted samples of flowbridge"):
            WeightedSamples.load(tmp_path / "empty.h5")

    @pytest.mark.parametrize(
        "name",
        ["coordinates", "flowbridge/positions", "flowbridge/log_weights", "flowbridge/reduced_potentials/1"],
    )
    def test_edited_files_are_refused(self, tmp_path, name):
        path = tmp_path / "samples.h5"
        make().save(path)
        with h5py.File(path, "r+") as file:
            file[name][0] = 9.0
        with pytest.raises(SampleFileError, match="does not match its digest"):
            WeightedSamples.load(path)

    def test_newer_files_are_refused(self, tmp_path):
        path = tmp_path / "samples.h5"
        make().save(path)
        path.write_bytes(path.read_bytes().replace(b"version 1", b"version 2", 1))
        with pytest.raises(SampleFileError, match="format version 2, this flowbridge reads up to 1: update flowbridge"):
            WeightedSamples.load(path)

    def test_every_flipped_bit_is_refused(self, tmp_path):
        path = tmp_path / "samples.h5"
        make(50).save(path)
        content = path.read_bytes()
        rng = np.random.default_rng(0)
        positions = [*range(0, 200, 3), 300, 511, *rng.integers(512, len(content), 300)]
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            with pytest.raises(SampleFileError, match=r"samples\.h5"):
                WeightedSamples.load(path)

    def test_equal_samples_make_equal_files(self, tmp_path):
        for name in ("a.h5", "b.h5"):
            make().save(tmp_path / name)
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()

    def test_bytes_added_at_the_end_are_refused(self, tmp_path):
        path = tmp_path / "samples.h5"
        make().save(path)
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(SampleFileError, match="does not match its digest"):
            WeightedSamples.load(path)


class TestExports:
    def test_mdtraj(self):
        samples = make()
        trajectory = samples.to_mdtraj()
        assert isinstance(trajectory, mdtraj.Trajectory)
        assert trajectory.xyz == pytest.approx(samples.positions, abs=1e-7)

    def test_openmm_context_takes_the_positions(self):
        samples = make()
        system = openmm.System()
        for mass in WATER.masses:
            system.addParticle(mass)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(samples.to_openmm_positions(-1))
        state = context.getState(getPositions=True)
        got = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        assert np.array_equal(got, samples.positions[-1])
        with pytest.raises(IndexError, match="200 of 200"):
            samples.to_openmm_positions(200)

    def test_ase(self, tmp_path):
        samples = make()
        frames = samples.to_ase(slice(10, 13))
        assert len(frames) == 3
        assert frames[0].positions / nm == pytest.approx(samples.positions[10])
        assert np.abs(frames[0].positions).max() > 0.5 * Angstrom
        assert frames[0].get_chemical_symbols() == ["O", "H", "H", "X"]
        assert frames[0].get_masses().tolist() == list(WATER.masses)
        assert frames[2].info["log_weight"] == samples.log_weights[12]
        assert frames[2].info["u_target"] == samples.reduced_potentials["target"][12]
        assert len(samples.to_ase()) == 200
        ase.io.write(tmp_path / "frames.xyz", frames, format="extxyz")
        back = ase.io.read(tmp_path / "frames.xyz", index=2)
        assert back.info["log_weight"] == pytest.approx(samples.log_weights[12])

    def test_pandas(self):
        samples = make()
        table = samples.to_pandas({"x": samples.positions[:, 0, 0]})
        assert isinstance(table, pandas.DataFrame)
        assert list(table.columns) == ["log_weight", "weight", "u_target", "u_generator", "x"]
        assert (table.weight * table.x).sum() == pytest.approx(samples.average(table.x).value)
        assert table.attrs["temperature_K"] == 310.0
        with pytest.raises(ValueError, match="'weight'"):
            samples.to_pandas({"weight": np.zeros(200)})
        with pytest.raises(ValueError, match=r"got shape \(3,\)"):
            samples.to_pandas({"x": np.zeros(3)})

    def test_errors_are_flowbridge_errors(self):
        assert issubclass(SampleFileError, FlowbridgeError)
