"""Langevin replicas and parallel tempering against what statistical mechanics says."""

import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError, NonFiniteEnergyError
from flowbridge.core.potential import EnergyAndForces, Particles, Potential, PotentialMetadata
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.batched_dynamics import LangevinReplicas
from flowbridge.forcefields.parallel_tempering import ParallelTempering
from flowbridge.forcefields.prior_terms import HarmonicBonds, PriorEnergy


class Springs(Potential):
    """Each particle on its own spring to the origin."""

    def __init__(self, stiffness: float, count: int = 3):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("A",) * count, (0,) * count, (20.0,) * count), temperature=300.0)
        self.stiffness = stiffness

    def forward(self, positions, cell=None):
        return 0.5 * self.stiffness * positions.square().sum((1, 2))

    def energy_and_forces(self, positions, cell=None):
        return EnergyAndForces(self(positions), -self.stiffness * positions)


class DoubleWell(Potential):
    """``height ((x/a)^2 - 1)^2 + tilt x/a`` along x of one particle, springs across."""

    height, tilt, width, across = 12.0, 1.5, 0.1, 500.0

    def __init__(self):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("A",), (0,), (20.0,)), temperature=300.0)

    def along(self, x):
        return self.height * ((x / self.width) ** 2 - 1.0) ** 2 + self.tilt * x / self.width

    def forward(self, positions, cell=None):
        return self.along(positions[:, 0, 0]) + 0.5 * self.across * positions[:, 0, 1:].square().sum(-1)


class TestLangevin:
    def test_variances_of_an_oscillator(self):
        kt, stiffness = thermal_energy(300.0), 2000.0
        start = torch.zeros(300, 3, 3, dtype=torch.float64)
        run = LangevinReplicas(Springs(stiffness), start, 300.0, step_ps=0.01, friction_per_ps=10.0, seed=3)
        run.step(300)
        frames = run.run(60, 10)
        per_replica = np.square(frames).mean(axis=(0, 2, 3))
        error = per_replica.std(ddof=1) / np.sqrt(len(per_replica))
        # BAOAB samples the configurations of an oscillator exactly, whatever the step.
        assert abs(per_replica.mean() - kt / stiffness) < 4.0 * error
        speeds = run.state.velocities.square().mean((1, 2)).numpy()
        assert abs(speeds.mean() / (kt / 20.0) - 1.0) < 4.0 * speeds.std(ddof=1) / np.sqrt(300) / (kt / 20.0) + 0.03

    def test_without_friction_energy_is_kept(self):
        start = 0.05 * torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        run = LangevinReplicas(Springs(1000.0), start, 300.0, step_ps=0.002, friction_per_ps=0.0, seed=1)

        def total():
            return run.state.energies + 10.0 * run.state.velocities.square().sum((1, 2))

        before = total()
        run.step(2000)
        assert torch.allclose(total(), before, rtol=2e-3)

    def test_going_on_gives_the_same_numbers(self):
        start = torch.zeros(5, 3, 3, dtype=torch.float64)
        whole = LangevinReplicas(Springs(1000.0), start, 300.0, step_ps=0.01, seed=4)
        whole.step(30)
        state = {key: np.array(value) for key, value in whole.state_dict().items()}
        expected = whole.step(25).positions.clone()
        again = LangevinReplicas(Springs(1000.0), start, 300.0, step_ps=0.01, seed=99)
        again.load_state_dict(state)
        assert torch.equal(again.step(25).positions, expected)

    def test_compiled_or_not_replicas_are_independent(self):
        """A replica's path does not depend on how many others there are, up to its noise."""
        start = torch.zeros(2, 3, 3, dtype=torch.float64)
        run = LangevinReplicas(Springs(1000.0), start, torch.tensor([300.0, 600.0]), step_ps=0.01, seed=4)
        run.step(200)
        assert not torch.allclose(run.state.positions[0], run.state.positions[1])


class TestStopped:
    @pytest.fixture
    def weak(self):
        beads = Particles(("A", "B", "C"), (0, 0, 0), (10.0, 10.0, 10.0), ((0, 1), (1, 2)))
        bonds = HarmonicBonds(beads.bonds, lengths=[0.3, 0.3], stiffness=[1000.0, 1e-6])
        return PriorEnergy(beads, [bonds], 300.0)

    def test_beads_that_fly_apart(self, weak, tmp_path):
        start = torch.tensor([[[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.6, 0.0, 0.0]]], dtype=torch.float64)
        run = LangevinReplicas(
            weak, start, 300.0, step_ps=0.01, friction_per_ps=0.1, seed=1, last_good=tmp_path / "good.npz"
        )
        with pytest.raises(
            NonFiniteEnergyError, match=r"replica 0 .* flown apart; the largest force.*last good.*good.npz"
        ):
            run.step(5000)
        kept = np.load(tmp_path / "good.npz")["positions"]
        assert np.isfinite(kept).all()
        assert np.linalg.norm(kept[0, 2] - kept[0, 1]) < 3 * 0.3

    def test_a_step_that_is_too_long(self):
        start = 0.01 * torch.ones(2, 3, 3, dtype=torch.float64)
        run = LangevinReplicas(Springs(1e6), start, 300.0, step_ps=0.05, seed=1)
        with pytest.raises(NonFiniteEnergyError, match=r"energy is (inf|nan)"):
            run.step(3000)

    def test_the_force_field_names_the_term(self, force_field):
        x = force_field.examples[0].clone()
        x[4] += torch.tensor([0.0, 0.0, 0.3])
        worst = force_field.worst_strain(x)
        assert worst.bead in (3, 4)
        assert worst.term == "bonds"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step_ps": 0.0}, "must be positive"),
            ({"temperatures": -1.0}, "temperature must be"),
            ({"positions": torch.zeros(2, 4, 3)}, "start from"),
        ],
    )
    def test_settings(self, change, message):
        given = {
            "positions": torch.zeros(2, 3, 3, dtype=torch.float64),
            "temperatures": 300.0,
            "step_ps": 0.01,
            **change,
        }
        with pytest.raises((ConfigurationError, ValueError), match=message):
            LangevinReplicas(Springs(10.0), given.pop("positions"), given.pop("temperatures"), **given)


class TestParallelTempering:
    def test_a_barrier_that_dynamics_does_not_cross(self):
        """All start in the upper well; the populations and their ratio come out right."""
        well = DoubleWell()
        start = torch.zeros(100, 1, 3, dtype=torch.float64)
        start[:, 0, 0] = 0.1
        run = ParallelTempering(
            well, start, [300.0, 600.0, 1200.0], step_ps=0.02, exchange_interval=25, friction_per_ps=3.0, seed=2
        )
        run.run(20, 50)
        frames = run.run(60, 50)
        assert (run.acceptance > 0.2).all()
        right = (frames[..., 0, 0] > 0.0).mean(axis=0)
        grid = np.linspace(-0.3, 0.3, 4001)
        weight = np.exp(-well.along(grid) / thermal_energy(300.0))
        expected = weight[grid > 0].sum() / weight.sum()
        error = right.std(ddof=1) / np.sqrt(len(right))
        assert error < 0.05
        assert abs(right.mean() - expected) < 4.0 * error

    def test_resumed(self):
        start = torch.zeros(4, 3, 3, dtype=torch.float64)
        options = {"step_ps": 0.01, "exchange_interval": 7}
        whole = ParallelTempering(Springs(1000.0), start, [300.0, 400.0, 500.0], **options)
        whole.run(3, 10)
        state = {key: np.array(value) for key, value in whole.state_dict().items()}
        expected = whole.run(3, 10)
        again = ParallelTempering(Springs(1000.0), start, [300.0, 400.0, 500.0], **options)
        again.load_state_dict(state)
        assert np.array_equal(again.run(3, 10), expected)

    def test_each_ladder_keeps_one_replica_a_rung(self):
        run = ParallelTempering(
            Springs(1000.0), torch.zeros(6, 3, 3, dtype=torch.float64), [300.0, 310.0, 320.0, 330.0], step_ps=0.01,
            exchange_interval=5,
        )  # fmt: skip
        run.run(4, 10)
        assert torch.equal(run.rung_of.sort(dim=1).values, torch.arange(4).repeat(6, 1))
        assert run.lowest().shape == (6, 3, 3)

    def test_temperatures_must_increase(self):
        with pytest.raises(ConfigurationError, match="must increase"):
            ParallelTempering(Springs(1.0), torch.zeros(1, 3, 3), [400.0, 300.0], step_ps=0.01)
