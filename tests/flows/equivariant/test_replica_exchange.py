"""Reference samples against quadrature and the virial, and runs that are interrupted."""

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.equivariant.replica_exchange import ReplicaExchange, ReplicaExchangeSettings, virial
from flowbridge.flows.equivariant.systems import DoubleWellParticles, LennardJonesCluster

SHORT = ReplicaExchangeSettings(
    chains=20, temperatures=(1.0, 2.0), equilibration=30, thinning=2, frames=12, checkpoint_interval=4
)


def test_a_pair_in_a_double_well_against_quadrature():
    """Populations of both wells, across a barrier of more than 4 kT, and the mean distance."""
    system = DoubleWellParticles(2)
    settings = ReplicaExchangeSettings(
        chains=100, temperatures=(1.0, 2.0, 4.0), leapfrog_steps=6, equilibration=250, thinning=4, frames=100
    )
    run = ReplicaExchange(system, settings, seed=1)
    x = run.run()
    distances = (x[:, 0] - x[:, 1]).norm(dim=-1).numpy()
    grid = np.linspace(1e-3, 9.0, 4000)
    weight = grid * np.exp(-system.pair_term(torch.from_numpy(grid)).energy.numpy())
    weight /= weight.sum()
    for values, expected in ((distances > 4.0, weight[grid > 4.0].sum()), (distances, weight @ grid)):
        frames = values.reshape(100, 100).mean(1)  # means of frames are correlated in time: blocks of ten
        error = frames.reshape(10, 10).mean(1).std(ddof=1) / np.sqrt(10)
        assert values.mean() == pytest.approx(expected, abs=4.5 * error)
    statistics = run.statistics()
    assert all(0.6 < accepted < 0.99 for accepted in statistics["accepted"])
    assert all(0.1 < exchanged < 1.0 for exchanged in statistics["exchanged"])


def test_virial_of_a_small_cluster():
    system = LennardJonesCluster(4)
    settings = ReplicaExchangeSettings(chains=100, temperatures=(1.0, 1.5), equilibration=100, thinning=5, frames=90)
    x = ReplicaExchange(system, settings, seed=2).run()
    value, error = virial(system, x)
    assert error < 0.25
    assert value == pytest.approx(system.degrees_of_freedom, abs=4.5 * error)
    other, _ = virial(LennardJonesCluster(4, times_counted=1), x)
    assert abs(other - system.degrees_of_freedom) > 6.0 * error  # the convention of pairs shows


def test_an_interrupted_run_gives_the_same_samples(tmp_path):
    system = LennardJonesCluster(3)
    whole = ReplicaExchange(system, SHORT, seed=5).run()

    class Stop(Exception):
        pass

    def interrupt(items, total):
        for number, item in enumerate(items):
            if number == 45:  # after the first checkpoint, before the second
                raise Stop
            yield item

    with pytest.raises(Stop):
        ReplicaExchange(system, SHORT, seed=5).run(tmp_path, progress=interrupt)
    resumed = ReplicaExchange(system, SHORT, seed=5)
    assert torch.equal(resumed.run(tmp_path), whole)
    assert torch.equal(ReplicaExchange(system, SHORT, seed=5).run(tmp_path), whole)
    with pytest.raises(ConfigurationError, match="another"):
        ReplicaExchange(system, SHORT, seed=6).run(tmp_path)


def test_a_complete_run_is_read_and_not_written(tmp_path):
    """So several processes can read it at once, also where nothing may be written."""
    system = LennardJonesCluster(3)
    whole = ReplicaExchange(system, SHORT, seed=5).run(tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat()
    assert torch.equal(ReplicaExchange(system, SHORT, seed=5).run(tmp_path), whole)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_hostile_settings():
    for wrong in (
        {"temperatures": (2.0, 1.0)},
        {"temperatures": ()},
        {"chains": 0},
        {"spread": 0.0},
        {"equilibration": -1},
    ):
        with pytest.raises(ConfigurationError):
            ReplicaExchangeSettings(**wrong)
