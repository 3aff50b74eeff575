"""Densities of other libraries as potentials, from their published packages, in OpenMM and ASE."""

import ase
import numpy as np
import openmm
import pytest
import torch
from ase import units
from openmm import unit
from torch import nn

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.integrations.external_flows import DensityPotential
from flowbridge.integrations.openmm import add_potential, particle_system

TEMPERATURE = 310.0
KT = thermal_energy(TEMPERATURE)
PARTICLES = Particles(("Ar1", "Ar2", "Ne"), (18, 18, 10), (39.948, 39.948, 20.180))
SIZE = 9
unsaved = pytest.mark.filterwarnings("ignore:this potential is in no model file")


class BgflowLike:
    """An object with a reduced energy of shape ``(B, 1)``."""

    def energy(self, x):
        return (8.0 * (x - 0.1) ** 2).sum(-1, keepdim=True) + 0.3 * (x[:, :1] * x[:, 1:2])


def zuko_flow():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")
    flow = zuko.flows.MAF(SIZE, transforms=2, hidden_features=(16,), activation=nn.SiLU)
    return flow, lambda x: flow().log_prob(x)


def zuko_conditional():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")
    flow = zuko.flows.MAF(SIZE, 2, transforms=1, hidden_features=(16,), activation=nn.SiLU)
    return flow, lambda x: flow(torch.tensor([0.5, -1.0], dtype=x.dtype)).log_prob(x)


def nflows_flow():
    pytest.importorskip("nflows", reason="nflows is not installed: pip install nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    transform = MaskedAffineAutoregressiveTransform(SIZE, 16, activation=torch.nn.functional.silu)
    flow = Flow(transform, StandardNormal([SIZE]))
    return flow, flow.log_prob


def normflows_flow():
    normflows = pytest.importorskip("normflows", reason="normflows is not installed: pip install normflows")

    class Smooth(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(inputs, 16), nn.SiLU(), nn.Linear(16, outputs))

        def forward(self, x):
            return self.net(x)

    mask = torch.tensor([float(i % 2) for i in range(SIZE)])
    layers = [normflows.flows.MaskedAffineFlow(b, Smooth(SIZE, SIZE), Smooth(SIZE, SIZE)) for b in (mask, 1.0 - mask)]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(SIZE), layers)
    return flow, flow.log_prob


def torch_flat():
    normal = torch.distributions.MultivariateNormal(
        torch.linspace(-0.1, 0.1, SIZE).double(), 0.02 * torch.eye(SIZE).double()
    )
    return normal, normal.log_prob


def torch_by_particle():
    normal = torch.distributions.Normal(torch.linspace(-0.1, 0.1, SIZE).double().reshape(3, 3), 0.2)
    normal = torch.distributions.Independent(normal, 2)
    return normal, lambda x: normal.log_prob(x.reshape(-1, 3, 3))


def bgflow_like():
    density = BgflowLike()
    return density, lambda x: -density.energy(x)[:, 0]


MAKERS = [zuko_flow, zuko_conditional, nflows_flow, normflows_flow, torch_flat, torch_by_particle, bgflow_like]


def random_positions(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(count, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def made(request):
    """A potential and the log-density as its library computes it, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        density, log_prob = request.param()
    if isinstance(density, nn.Module):
        density.double().eval()
        for parameter in density.parameters():
            parameter.data += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(4), dtype=parameter.dtype
            )
    context = torch.tensor([0.5, -1.0]).double() if request.param is zuko_conditional else None
    return DensityPotential(density, PARTICLES, TEMPERATURE, context=context), log_prob


def test_the_energy_is_that_of_the_density(made):
    potential, log_prob = made
    positions = random_positions(5)
    with torch.no_grad():
        expected = -KT * log_prob(positions.flatten(1))
    found = potential.energy_and_forces(positions).energy
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-12)
    assert float(found.std()) > 0.1


def test_forces_are_slopes(made):
    potential, _ = made
    positions = random_positions(2)
    forces = potential.energy_and_forces(positions).forces
    step = 1e-5
    for index in range(SIZE):
        shift = torch.zeros(SIZE, dtype=torch.float64)
        shift[index] = step
        up, down = (potential.energy_and_forces(positions + sign * shift.reshape(3, 3)).energy for sign in (1.0, -1.0))
        assert torch.allclose(forces.flatten(1)[:, index], -(up - down) / (2 * step), rtol=1e-5, atol=1e-5)


def test_batches_are_single_configurations(made):
    potential, _ = made
    positions = random_positions(4)
    together = potential.energy_and_forces(positions)
    for index in range(4):
        alone = potential.energy_and_forces(positions[index : index + 1])
        assert torch.allclose(alone.energy, together.energy[index : index + 1], rtol=1e-11)
        assert torch.allclose(alone.forces, together.forces[index : index + 1], rtol=1e-9, atol=1e-9)


@unsaved
def test_in_openmm_and_ase(made):
    """Energy and forces of the engines; and OpenMM makes steps with it that keep the energy."""
    potential, _ = made
    positions = random_positions(1)
    expected = potential.energy_and_forces(positions)
    system = particle_system(potential)
    add_potential(system, potential)
    integrator = openmm.VerletIntegrator(0.0005)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions[0].numpy())
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    assert energy == pytest.approx(float(expected.energy), rel=1e-12)
    assert np.allclose(forces, expected.forces[0], rtol=1e-10, atol=1e-10)
    total = []
    for _ in range(40):
        integrator.step(5)
        state = context.getState(energy=True)
        total.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    assert np.std(total) < 0.05
    atoms = ase.Atoms(numbers=PARTICLES.atomic_numbers, positions=positions[0].numpy() * units.nm)
    atoms.calc = PotentialCalculator(potential)
    assert atoms.get_potential_energy() == pytest.approx(energy * units.kJ / units.mol, rel=1e-10)
    assert np.allclose(atoms.get_forces(), forces * units.kJ / units.mol / units.nm, rtol=1e-8, atol=1e-10)


def test_over_internal_coordinates(alanine):
    """A density over our molecule's coordinates has the energy of our own flow where the density is the same."""
    design = FlowConfiguration.model_validate(
        {"torsions": {"couplings": 1, "components": 2, "hidden": [4]}, "stiff": {"couplings": 1, "hidden": [4]}}
    )
    model = BoltzmannGenerator.untrained(alanine.particles, TEMPERATURE, alanine.shaken(600), design)
    model.requires_grad_(False).double()
    count = model.flow.circular_dimension

    class Same:
        def log_prob(self, x):
            return model.flow.log_prob(Coordinates(x[:, :count], x[:, count:]))

    positions = torch.as_tensor(alanine.shaken(3, seed=5))
    potential = DensityPotential(
        Same(), alanine.particles, TEMPERATURE, coordinates=model.coordinates.inverse, example=positions
    )
    assert torch.allclose(potential(positions), model(positions), rtol=1e-12)


class TestBadInput:
    def test_no_density(self):
        with pytest.raises(ConfigurationError, match="a dict is no density"):
            DensityPotential({}, PARTICLES, TEMPERATURE)

    def test_another_number_of_coordinates(self):
        normal = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
        with pytest.raises(ConfigurationError, match="cannot be evaluated for 9 numbers, 3 for each of 3 particles"):
            DensityPotential(normal, PARTICLES, TEMPERATURE)

    def test_one_number_for_each_coordinate(self):
        with pytest.raises(ConfigurationError, match=r"log-probabilities of shape \(2, 9\).*Independent"):
            DensityPotential(torch.distributions.Normal(0.0, 1.0), PARTICLES, TEMPERATURE)

    def test_defined_for_some_configurations(self):
        uniform = torch.distributions.Uniform(torch.zeros(9), torch.ones(9), validate_args=True)
        cube = torch.distributions.Independent(uniform, 1)
        with pytest.raises(ConfigurationError, match="give one as example="):
            DensityPotential(cube, PARTICLES, TEMPERATURE)
        inside = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
        assert float(DensityPotential(cube, PARTICLES, TEMPERATURE, example=inside)(inside)) == 0.0

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_temperature(self, temperature):
        with pytest.raises(ConfigurationError, match="temperature must be positive"):
            DensityPotential(BgflowLike(), PARTICLES, temperature)

    def test_cell(self):
        potential = DensityPotential(BgflowLike(), PARTICLES, TEMPERATURE)
        with pytest.raises(ConfigurationError, match="neither a cell"):
            potential(random_positions(1), torch.eye(3)[None])
