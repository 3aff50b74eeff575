"""Conformance checks: what they accept, and that each defect is caught by its name."""

import math
from pathlib import Path

import pytest
import torch
import zuko

import flowbridge
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.generator import GeneratorPotential
from flowbridge.core.potential import EnergyAndForces, Particles, Potential, PotentialMetadata
from flowbridge.core.reweighting import Draws
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.external_flows import DensityPotential
from flowbridge.testing import (
    ConformanceError,
    check_generator,
    check_potential,
    examine_generator,
    examine_potential,
)

ARGON = Particles(("A", "B", "C"), (18, 18, 18), (39.9,) * 3)
AT = 0.3 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Springs(Potential):
    """Three particles on springs between all pairs; each test below breaks one thing of it."""

    def __init__(self, **metadata):
        super().__init__()
        self.metadata = PotentialMetadata(ARGON, **metadata)

    def vectors(self, positions, cell):
        pairs = positions[:, [0, 0, 1]] - positions[:, [1, 2, 2]]
        if cell is None:
            return pairs
        fractional = pairs @ torch.linalg.inv(cell)
        return (fractional - torch.round(fractional)) @ cell

    def forward(self, positions, cell=None, **values):
        squared = self.vectors(positions, cell).square().sum(-1)
        return (500.0 * torch.exp(-2.0 * squared)).sum(-1).double()


class TestAccepted:
    def test_a_generator(self, alanine):
        design = {
            "torsions": {"couplings": 1, "components": 3, "hidden": [4]},
            "stiff": {"couplings": 1, "hidden": [4]},
        }
        model = BoltzmannGenerator.untrained(
            alanine.particles, 300.0, alanine.shaken(400), FlowConfiguration.model_validate(design)
        )
        report = check_potential(model.double())
        assert report.passed
        assert {"rotation", "model file", "ASE calculator", "OpenMM on Reference", "OpenMM on CPU"} <= {
            check.name for check in report.checks if check.passed
        }

    def test_closed_forms(self, morse, alanine, fluid):
        report = check_potential(morse, torch.as_tensor(alanine.shaken(3)))
        assert report["defaults of global parameters"].passed
        positions = 1.4 * torch.rand(3, 12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        report = check_potential(fluid, positions, 1.5 * torch.eye(3))
        assert report["translation of single particles by lattice vectors"].passed
        assert report["batched energies"].passed is None

    def test_a_foreign_density_without_invariances(self):
        torch.manual_seed(1)
        flow = zuko.flows.NSF(9, transforms=1, bins=4, hidden_features=[8]).double()
        potential = DensityPotential(flow(), ARGON, 300.0)
        report = check_potential(potential, AT, invariances=())
        assert report["model file"].passed is None
        assert not examine_potential(potential, AT, adapters=False)["translation"].passed

    def test_the_report_reads_well(self, capsys):
        print(check_potential(Springs(), AT))
        shown = capsys.readouterr().out
        assert shown.startswith("Springs\n  ok   shapes and types")
        assert "-    model file: has no kind" in shown


class WrongSign(Springs):
    def energy_and_forces(self, positions, cell=None, **values):
        energy, forces = super().energy_and_forces(positions, cell)
        return EnergyAndForces(energy, -forces)


class SlightlyWrong(Springs):
    def energy_and_forces(self, positions, cell=None, **values):
        energy, forces = super().energy_and_forces(positions, cell)
        return EnergyAndForces(energy, 1.0001 * forces)


class MeanOfBatch(Springs):
    def forward(self, positions, cell=None, **values):
        return super().forward(positions, cell).mean().expand(len(positions))


class SinglePrecision(Springs):
    def forward(self, positions, cell=None, **values):
        return super().forward(positions, cell).float()


class NotDetached(Springs):
    def energy_and_forces(self, positions, cell=None, **values):
        energy = self(positions.requires_grad_(True), cell)
        return EnergyAndForces(energy, -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0])


class InAField(Springs):
    def forward(self, positions, cell=None, **values):
        return super().forward(positions, cell) + 100.0 * positions[:, 0, 2].square().double()


class Elongated(Springs):
    """Invariant under translation, not under rotation."""

    def vectors(self, positions, cell):
        return super().vectors(positions, cell) * torch.tensor([1.0, 1.0, 1.5], dtype=positions.dtype)


class Moving(Springs):
    def forward(self, positions, cell=None, **values):
        with torch.no_grad():
            positions.sub_(positions.mean(1, keepdim=True))
        return super().forward(positions, cell)


class Noisy(Springs):
    def forward(self, positions, cell=None, **values):
        return super().forward(positions, cell) * (1.0 + 1e-12 * torch.randn((), dtype=torch.float64))


class NotWrapped(Springs):
    def vectors(self, positions, cell):
        return positions[:, [0, 0, 1]] - positions[:, [1, 2, 2]]


class OnlyDoubles(Springs):
    def forward(self, positions, cell=None, **values):
        return super().forward(positions @ torch.eye(3, dtype=torch.float64), cell)


class OtherDefault(Springs):
    def __init__(self):
        super().__init__(global_parameters={"strength": 1.0})

    def forward(self, positions, cell=None, strength=1.1):
        return strength * super().forward(positions, cell)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (WrongSign(), "forces against finite differences"),
        (SlightlyWrong(), "forces against finite differences"),
        (MeanOfBatch(), "batch against single configurations"),
        (SinglePrecision(), "shapes and types"),
        (NotDetached(), "shapes and types"),
        (InAField(), "translation"),
        (InAField(), "rotation"),
        (Elongated(), "rotation"),
        (Moving(), "repeats itself, leaves its input alone"),
        (Noisy(), "repeats itself, leaves its input alone"),
        (NotWrapped(periodic=True), "translation of single particles by lattice vectors"),
        (OnlyDoubles(), "positions in single precision"),
        (OtherDefault(), "defaults of global parameters"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Potential) else value,
)
def test_each_defect_is_caught(broken, check):
    report = examine_potential(broken, AT, adapters=False)
    assert report[check].passed is False, report
    with pytest.raises(ConformanceError, match=check):
        report.require()


def test_all_failures_are_listed():
    with pytest.raises(ConformanceError) as failure:
        check_potential(InAField(), AT, adapters=False)
    assert "2 of" in str(failure.value)
    assert "translation" in str(failure.value)
    assert "rotation" in str(failure.value)


def test_an_adapter_that_gives_something_else():
    """Forces that are right alone and wrong in a batch of one: only the engines see it."""

    class WrongAlone(Springs):
        def energy_and_forces(self, positions, cell=None, **values):
            energy, forces = super().energy_and_forces(positions, cell)
            return EnergyAndForces(energy + (len(positions) == 1), forces)

    report = examine_potential(WrongAlone(), AT)
    assert report["ASE calculator"].passed is False
    assert report["OpenMM on Reference"].passed is False
    assert report["batched energies"].passed


class TestArguments:
    def test_refused(self, morse):
        with pytest.raises(ConfigurationError, match=r"positions must be .*\(B, 3, 3\) nm, got \(1, 4, 3\)"):
            check_potential(Springs(), torch.zeros(4, 3))
        with pytest.raises(ConfigurationError, match="not periodic"):
            check_potential(Springs(), AT, torch.eye(3))
        with pytest.raises(ConfigurationError, match="no invariance 'mirror'"):
            check_potential(Springs(), AT, invariances=["mirror"])

    def test_no_finite_energy(self):
        class Nothing(Springs):
            def forward(self, positions, cell=None, **values):
                return super().forward(positions, cell) * torch.nan

        with pytest.raises(ConfigurationError, match=r"no finite energy and forces .* give positions"):
            check_potential(Nothing(), AT)


class Gaussian(GeneratorPotential):
    """Independent normal coordinates of two atoms of argon."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(ARGON, temperature=300.0)

    def log_prob(self, positions):
        numbers = 3 * len(ARGON)
        return -0.5 * (positions.double() / 0.1).square().sum((1, 2)) - numbers * math.log(0.1 * math.sqrt(math.tau))

    def sample_positions(self, count, generator):
        positions = 0.1 * torch.randn(count, len(ARGON), 3, generator=generator, dtype=torch.float64)
        return Draws(positions, self.log_prob(positions))


class NotNormalised(Gaussian):
    def log_prob(self, positions):
        return super().log_prob(positions) + 0.7


class OtherSamples(Gaussian):
    def sample_positions(self, count, generator):
        draws = super().sample_positions(count, generator)
        return draws._replace(positions=1.01 * draws.positions)


class GloballyRandom(Gaussian):
    def sample_positions(self, count, generator):
        positions = 0.1 * torch.randn(count, len(ARGON), 3, dtype=torch.float64)
        return Draws(positions, self.log_prob(positions))


class SingleDensity(Gaussian):
    def log_prob(self, positions):
        return super().log_prob(positions).float()


class Wide:
    """A harmonic well whose partition function is known."""

    stiffness = thermal_energy(300.0) / 0.11**2
    log_partition = 3 * len(ARGON) * math.log(0.11 * math.sqrt(math.tau))

    def energies_and_forces(self, positions):
        return 0.5 * self.stiffness * (positions**2).sum((1, 2)), -self.stiffness * positions


class TestGenerators:
    def test_accepted(self):
        report = check_generator(Gaussian(), target=Wide(), log_partition=Wide.log_partition)
        assert all(check.passed for check in report.checks)
        assert check_generator(Gaussian())["mean weight"].passed is None

    @pytest.mark.parametrize(
        ("broken", "check"),
        [
            (NotNormalised, "mean weight"),
            (OtherSamples, "samples have the density of log_prob"),
            (GloballyRandom, "seeds"),
            (GloballyRandom, "global random state"),
            (SingleDensity, "shapes and types"),
        ],
    )
    def test_each_defect_is_caught(self, broken, check):
        report = examine_generator(broken(), target=Wide(), log_partition=Wide.log_partition)
        assert report[check].passed is False
        with pytest.raises(ConformanceError, match=check):
            report.require()

    @pytest.mark.parametrize(
        ("name", "tolerance"),
        [
            ("boltzmann_generator_alanine", 1e-4),
            ("boltzmann_generator_rank_one", 1e-4),
            ("equivariant_flow_network", 1e-2),  # of the steps of its solver
            ("rigid_body_generator", 1e-4),
        ],
    )
    def test_the_generators_that_are_here(self, name, tolerance):
        file = Path(__file__).parents[1] / "data" / "models_0_1" / f"{name}.flow"
        check_generator(flowbridge.load(file), count=50, tolerance=tolerance)
