"""Work spread over the workers of a real Dask cluster: the same numbers as here, and nothing lost with a worker."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import distributed
import numpy as np
import openmm
import pytest
from openmm import app
from spread_jobs import broken, end_of_worker, identity, process_of

from flowbridge.core.errors import ConfigurationError, WorkerError
from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.dask import DaskExecutor, connected
from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
from flowbridge.integrations.openmm.energies.distributed import DistributedEnergy
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, load_trajectory, run_all


@pytest.fixture(scope="module")
def client():
    # Spawned workers import the main module, which is pytest's: that is harmless.
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def executor(client):
    return DaskExecutor(client)


@pytest.fixture(scope="module")
def system(alanine):
    return app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(alanine.topology)


@pytest.fixture(scope="module")
def generator(alanine):
    return BoltzmannGenerator.untrained(alanine.particles, 300.0, alanine.shaken(400))


def runs(system, alanine, folder: Path, frames: int = 20) -> list[LangevinRun]:
    xml = openmm.XmlSerializer.serialize(system)
    return [
        LangevinRun(xml, alanine.positions, 300.0, 0.001, 2.0, 10, 10, frames, seed, folder / f"{seed}.npz")
        for seed in range(1, 5)
    ]


class TestJobs:
    def test_all_come_back_from_several_processes(self, executor):
        assert sorted(executor(identity, list(range(8)))) == list(range(8))
        assert len(set(executor(process_of, list(range(8))))) == executor.workers == 2
        assert list(executor(identity, [])) == []

    def test_an_error_keeps_its_type_and_words(self, executor):
        with pytest.raises(ValueError, match="job 3 is broken"):
            list(executor(broken, [3]))

    def test_a_job_that_kills_its_workers_is_reported(self, executor):
        with pytest.raises(WorkerError, match=r"cost 4 workers their life.*What is finished is kept"):
            list(executor(end_of_worker, [1]))


class TestSimulations:
    def test_same_frames_as_in_processes_here(self, system, alanine, executor, tmp_path):
        here = sorted(run_all(runs(system, alanine, tmp_path / "here"), ProcessExecutor(2)))
        there = sorted(run_all(runs(system, alanine, tmp_path / "there"), executor))
        for one, other in zip(here, there, strict=True):
            first, second = load_trajectory(one), load_trajectory(other)
            assert np.array_equal(first.positions, second.positions)
            assert np.array_equal(first.energies, second.energies)

    def test_a_worker_killed_in_the_middle_loses_nothing(self, system, alanine, client, executor, tmp_path):
        expected = sorted(run_all(runs(system, alanine, tmp_path / "here", 400), ProcessExecutor(2)))
        made = run_all(runs(system, alanine, tmp_path / "there", 400), executor)
        files = [next(made)]
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        files += made
        for one, other in zip(expected, sorted(files), strict=True):
            assert np.array_equal(load_trajectory(one).positions, load_trajectory(other).positions)


class TestEnergies:
    def test_same_as_here(self, system, alanine, executor):
        positions = alanine.shaken(500)
        positions[7, 3, 1] = np.nan
        expected = OpenMMEnergy(system, "Reference", workers=1).evaluate(positions)
        seen = []
        found = DistributedEnergy(system, executor, "Reference").evaluate(
            positions, progress=lambda done, of: seen.append((done, of))
        )
        assert np.array_equal(found.energies, expected.energies, equal_nan=True)
        assert np.array_equal(found.forces, expected.forces, equal_nan=True)
        assert found.failures == expected.failures == {7: "the position of particle 3 is nan"}
        assert seen[-1] == (500, 500)
        assert len(seen) > 1

    def test_energies_without_forces(self, system, alanine, executor):
        positions = alanine.shaken(200, 0.01)
        expected = OpenMMEnergy(system, "Reference").energies(positions)
        assert np.array_equal(DistributedEnergy(system, executor, "Reference").energies(positions), expected)

    def test_stopped(self, system, alanine, executor):
        stop = threading.Event()
        found = DistributedEnergy(system, executor, "Reference").evaluate(
            alanine.shaken(2000), progress=lambda *_: stop.set(), stop=stop
        )
        done = np.isfinite(found.energies)
        assert 0 < done.sum() < 2000
        assert set(found.failures) == set(np.flatnonzero(~done))

    def test_platform_found_by_itself(self, system, alanine, executor):
        energy = DistributedEnergy(system, executor)
        assert np.isfinite(energy.energies_and_forces(alanine.shaken(70))[0]).all()
        assert energy.platform in {"Reference", "CPU"}
        assert energy.energies_and_forces(alanine.shaken(0))[0].shape == (0,)

    def test_wrong_shapes_are_refused_here(self, system, alanine, executor):
        with pytest.raises(ConfigurationError, match=r"expected \(configurations, 22, 3\)"):
            DistributedEnergy(system, executor).evaluate(alanine.shaken(2)[:, 1:])


def test_weighted_samples_are_those_drawn_here(system, generator, executor, monkeypatch):
    monkeypatch.setattr("flowbridge.flows.boltzmann.generator._CHUNK", 50)
    monkeypatch.setattr("flowbridge.flows.boltzmann.generator._SMALLEST_JOB", 25)
    here = generator.sample(120, OpenMMEnergy(system, "Reference", workers=1), seed=4)
    there = generator.sample(120, DistributedEnergy(system, executor, "Reference"), seed=4, executor=executor)
    np.testing.assert_allclose(there.positions, here.positions, rtol=0, atol=1e-6)
    np.testing.assert_allclose(there.log_weights, here.log_weights, rtol=1e-5, atol=1e-3)


class TestClusters:
    def test_workers_with_several_threads_are_refused(self):
        with (
            distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as two,
            distributed.Client(two) as client,
            pytest.raises(ConfigurationError, match=r"2 threads.*Start workers with --nthreads 1"),
        ):
            DaskExecutor(client)

    def test_no_worker(self):
        with (
            distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as empty,
            distributed.Client(empty) as client,
            pytest.raises(
                WorkerError, match=r"no worker has joined the scheduler at .* within 0.5 seconds: start some"
            ),
        ):
            DaskExecutor(client, patience=0.5)

    def test_a_worker_with_another_version(self, client, monkeypatch):
        monkeypatch.setattr(
            "flowbridge.integrations.dask.version", lambda name: "0.0.1" if name == "openmm" else "not asked"
        )
        with pytest.raises(ConfigurationError, match=r"openmm 8\..* \(here 0.0.1\)"):
            DaskExecutor(client)

    def test_no_scheduler_there(self, tmp_path):
        with pytest.raises(ConfigurationError, match="there is no scheduler file"), connected("missing.json", 1):
            pass
        with (
            pytest.raises(ConfigurationError, match="no Dask scheduler answers at 'nonsense'"),
            connected("nonsense", 1),
        ):
            pass

    def test_by_address(self, client):
        with connected(client.scheduler.address, 1) as executor:
            assert list(executor(identity, [5])) == [5]
        with connected(client, 1) as executor:
            assert executor.workers >= 1
        assert client.status == "running"


def test_says_what_to_install():
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from flowbridge.core.errors import MissingDependencyError\n"
        "try:\n    import flowbridge.integrations.dask\n"
        "except MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'flowbridge[many-machines]'" in done.stdout
