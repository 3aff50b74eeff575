"""Evaluator: the calculator's own numbers, faults instead of crashes, nothing computed twice or lost."""

import numpy as np
import pytest
from ase import Atoms
from ase.units import nm
from calculators_that_fail import lennard_jones, not_a_number, raising, slow

from flowbridge.calculators.molecule_evaluator import EvaluatorSettings, MoleculeEvaluator
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.execution.executors import ProcessExecutor

WATER = (np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [-0.02, 0.1, 0.0]]))
PAIR = (np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.14]]))
STILL = EvaluatorSettings(relax=False)


def turned(molecule, seed=1):
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return molecule[0], molecule[1] @ matrix + 0.7


class TestEnergies:
    def test_the_energy_is_the_calculators(self):
        pytest.importorskip("tblite")
        from tblite.ase import TBLite

        atoms = Atoms(numbers=WATER[0], positions=WATER[1] * nm, calculator=TBLite(method="GFN2-xTB", verbosity=0))
        (found,) = MoleculeEvaluator("gfn2", STILL)([WATER])
        assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        assert found.evaluations == 1
        assert np.array_equal(found.positions, WATER[1])

    def test_relaxation_ends_in_the_minimum(self):
        (found,) = MoleculeEvaluator(lennard_jones, EvaluatorSettings(force=1e-4))([PAIR])
        assert np.linalg.norm(found.positions[1] - found.positions[0]) == pytest.approx(0.1 * 2 ** (1 / 6), abs=1e-5)
        assert found.energy == pytest.approx(-0.5, abs=1e-6)
        assert found.evaluations > 1

    def test_processes_give_the_same(self):
        molecules = [(PAIR[0], PAIR[1] * factor) for factor in (0.8, 0.9, 1.0, 1.1, 1.2)]
        here = MoleculeEvaluator("calculators_that_fail:lennard_jones")(molecules)
        there = MoleculeEvaluator("calculators_that_fail:lennard_jones", executor=ProcessExecutor(2))(molecules)
        assert [v.energy for v in here] == [v.energy for v in there]

    def test_workers_of_a_cluster_give_the_same(self):
        distributed = pytest.importorskip("distributed")
        from flowbridge.integrations.dask import DaskExecutor

        molecules = [(PAIR[0], PAIR[1] * factor) for factor in (0.8, 1.0, 1.2)]
        with (
            distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
        ):
            there = MoleculeEvaluator("calculators_that_fail:lennard_jones", executor=DaskExecutor(client))(molecules)
        here = MoleculeEvaluator("calculators_that_fail:lennard_jones")(molecules)
        assert [v.energy for v in there] == [v.energy for v in here]


class TestFaults:
    @pytest.mark.parametrize(
        ("calculator", "settings", "reason"),
        [
            (not_a_number, STILL, "the energy is nan"),
            (not_a_number, EvaluatorSettings(), "forces are not finite"),
            (raising, EvaluatorSettings(), "RuntimeError: no self-consistency"),
            (slow, EvaluatorSettings(relax=False, seconds=0.2), "longer than 0.2 seconds"),
            (lennard_jones, EvaluatorSettings(force=1e-9, steps=2), "not at rest after 2 steps"),
        ],
    )
    def test_a_calculator_that_fails(self, calculator, settings, reason):
        evaluator = MoleculeEvaluator(calculator, settings)
        (found,) = evaluator([PAIR])
        assert found.energy is None
        assert reason in found.fault

    def test_geometries_that_no_method_stands(self):
        near = (PAIR[0], PAIR[1] * 0.1)
        broken = (PAIR[0], PAIR[1] * np.nan)
        first, second = MoleculeEvaluator(lennard_jones)([near, broken])
        assert (first.evaluations, second.evaluations) == (0, 0)
        assert "0.014 nm apart" in first.fault
        assert "not finite" in second.fault

    @pytest.mark.parametrize("source", ["gfn3", "nowhere:thing", "calculators_that_fail:nothing", ""])
    def test_no_such_calculator(self, source):
        with pytest.raises(ConfigurationError, match="no calculator"):
            MoleculeEvaluator(source)

    def test_settings_that_make_no_sense(self):
        with pytest.raises(ConfigurationError, match="seconds"):
            EvaluatorSettings(seconds=0.0)


class TestMemory:
    def test_equal_geometries_are_computed_once(self):
        evaluator = MoleculeEvaluator(lennard_jones, STILL)
        found = evaluator([PAIR, turned(PAIR), (PAIR[0], PAIR[1] * 1.1), PAIR])
        assert evaluator.evaluations == 2
        assert found[0].energy == found[1].energy == found[3].energy
        assert evaluator([turned(PAIR, 5)])[0].known
        assert evaluator.evaluations == 2

    def test_another_run_finds_what_was_computed(self, tmp_path):
        file = tmp_path / "evaluations.sqlite"
        first = MoleculeEvaluator(lennard_jones, file=file)
        before = first([PAIR])
        again = MoleculeEvaluator(lennard_jones, file=file)  # while the first is still open, as after a kill
        assert again([PAIR])[0].energy == before[0].energy
        assert again.evaluations == 0
        assert np.allclose(again([PAIR])[0].positions, before[0].positions)

    def test_other_settings_and_calculators_are_other_evaluations(self, tmp_path):
        file = tmp_path / "evaluations.sqlite"
        MoleculeEvaluator(lennard_jones, file=file)([PAIR])
        still = MoleculeEvaluator(lennard_jones, STILL, file=file)
        still([PAIR])
        assert still.evaluations == 1

    def test_what_is_computed_before_a_crash_is_kept(self, tmp_path):
        class Interrupted:
            workers = 1

            def __call__(self, function, jobs):
                yield function(jobs[0])
                raise KeyboardInterrupt

        file = tmp_path / "evaluations.sqlite"
        molecules = [(PAIR[0], PAIR[1] * factor) for factor in (0.9, 1.0, 1.1, 1.2, 1.3, 1.4)]
        with pytest.raises(KeyboardInterrupt):
            MoleculeEvaluator(lennard_jones, STILL, executor=Interrupted(), file=file)(molecules)
        again = MoleculeEvaluator(lennard_jones, STILL, file=file)
        again(molecules)
        assert 0 < again.evaluations < 6

    def test_a_file_of_something_else(self, tmp_path):
        (tmp_path / "evaluations.sqlite").write_text("something else, long enough to be looked at " * 30)
        with pytest.raises(ConfigurationError, match="no file of evaluations"):
            MoleculeEvaluator(lennard_jones, file=tmp_path / "evaluations.sqlite")
