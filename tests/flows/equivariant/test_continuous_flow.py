"""Solvers, densities that integrate to one, and flows as energies in simulators."""

import math

import numpy as np
import pytest
import torch
from ase import Atoms, units
from openmm import Context, Platform, VerletIntegrator, unit

import flowbridge as fb
from flowbridge.calculators import PotentialCalculator
from flowbridge.core.compilation.building import accelerated
from flowbridge.core.errors import ConfigurationError, ModelFileError
from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.flows.equivariant.continuous_flow import ContinuousFlow
from flowbridge.flows.equivariant.fields.graph_field import GraphField, GraphFieldSettings
from flowbridge.flows.equivariant.fields.kernel_field import KernelField, KernelFieldSettings
from flowbridge.flows.equivariant.fields.network_field import NetworkField, NetworkFieldSettings
from flowbridge.flows.equivariant.fields.vector_fields import VectorField
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow
from flowbridge.flows.equivariant.mean_free import MeanFreeNormal
from flowbridge.flows.equivariant.ordinary_equations import Solver, transport
from flowbridge.flows.equivariant.systems import LennardJonesCluster, argon_like
from flowbridge.integrations.openmm import add_potential, particle_system
from flowbridge.testing import check_potential

GRAPH = GraphFieldSettings(hidden=8, features=4, triangles=4, radial=8, longest=4.0)
SETTINGS = {
    "graph": GRAPH,
    "kernel": KernelFieldSettings(distances=8, times=4, longest=4.0),
    "network": NetworkFieldSettings(hidden=12),
}
FIELDS = {"graph": GraphField, "kernel": KernelField, "network": NetworkField}


def roughened(field, size: float = 0.15, seed: int = 1):
    """Give a field random parameters, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return field


def flow_of(name: str, count: int = 3, dimension: int = 1, steps: int = 10) -> ContinuousFlow:
    field = FIELDS[name](count, dimension, SETTINGS[name], torch.Generator().manual_seed(0)).double()
    return ContinuousFlow(MeanFreeNormal(count, dimension, 1.2), roughened(field, 0.08), Solver(steps=steps))


class Growing(VectorField):
    """``v = rate x``: every length grows by ``exp(rate)``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, time, x):
        return self.rate * x


@pytest.mark.parametrize("solver", [Solver(steps=20), Solver(method="dopri5", rtol=1e-8, atol=1e-9)])
@pytest.mark.parametrize("backward", [False, True])
def test_a_field_with_a_known_solution(solver, backward):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = transport(Growing(0.7), x, solver, backward=backward)
    rate = -0.7 if backward else 0.7
    torch.testing.assert_close(found.value, x * math.exp(rate), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.divergence, torch.full((4,), 6.0 * rate).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_fixed_steps_converge_to_adaptive_ones_at_fourth_order(name):
    flow = flow_of(name, 4, 2)
    x = flow.prior.sample(8, torch.Generator().manual_seed(1), torch.float64)
    exact = transport(flow.field, x, Solver(method="dopri5", rtol=1e-9, atol=1e-10))
    errors = [
        (transport(flow.field, x, Solver(steps=steps)).divergence - exact.divergence).abs().max()
        for steps in ((2, 4, 8) if name == "network" else (8, 16, 32))
    ]
    # A quarter of the step: 256 times in the limit. Where particles meet, the divergence of a pair field has a kink.
    most, gain = (1e-5, 128.0) if name == "network" else (2e-3, 16.0)
    assert errors[2] < most
    assert errors[0] / errors[2] > gain


def test_what_cannot_be_solved_says_so():
    class Exploding(VectorField):
        def forward(self, time, x):
            return 1e3 * x.square()

    from flowbridge.core.errors import ConvergenceError

    with pytest.raises(ConvergenceError, match="tolerances"):
        transport(Exploding(), torch.ones(1, 2, 1).double(), Solver(method="dopri5"))


@pytest.mark.parametrize("name", FIELDS)
def test_densities_integrate_to_one(name):
    """Three particles on a line, in an orthonormal basis of the plane without mean."""
    flow = flow_of(name)
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]).double()
    basis /= basis.norm(dim=1, keepdim=True)
    grid = torch.linspace(-9.0, 9.0, 160, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob((torch.cartesian_prod(grid, grid) @ basis).unsqueeze(-1)).exp()
    assert density.sum().item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(
        1.0, abs=4e-3
    )  # of the cusps where particles meet
    prior = flow.prior.log_prob((torch.cartesian_prod(grid, grid) @ basis).unsqueeze(-1)).exp()
    assert (density - prior).abs().sum() > 0.05 * prior.sum()


@pytest.mark.parametrize("name", FIELDS)
def test_densities_of_samples(name):
    """What sampling says about its samples is what the density says about them."""
    flow = flow_of(name, 4, 3, steps=40)
    drawn = flow.draw(50, torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow.log_prob(drawn.value), drawn.log_prob, rtol=0, atol=5e-4)
    assert torch.equal(flow.sample(50, torch.Generator().manual_seed(1)), drawn.value)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["graph", "kernel"])
def test_densities_know_the_symmetries(name, dtype, tolerance):
    flow = flow_of(name, 5, 3).to(dtype)
    x = flow.prior.sample(20, torch.Generator().manual_seed(1), dtype)
    generator = torch.Generator().manual_seed(2)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    moved = x[:, torch.randperm(5, generator=generator)] @ rotation.to(dtype) + 0.5
    found, expected = flow.log_prob(moved), flow.log_prob(x)
    assert ((found - expected).abs() < tolerance * expected.abs().clamp(min=1.0)).all()
    plain = flow_of("network", 5, 3)
    change = plain.log_prob(moved.double()) - plain.log_prob(x.double())
    assert change.abs().mean() > 1e-3


@pytest.fixture(scope="module", params=[2, 3])
def potential(request) -> EquivariantFlow:
    flow = EquivariantFlow(
        argon_like(4), request.param, 0.8, GRAPH, Solver(steps=5), length=0.38, temperature=120.0
    ).double()
    roughened(flow.flow.field)
    return flow


def test_energies_and_forces(potential):
    """The energy is -kT log p per nm of the plane or of space; forces are its slopes, and along z of a plane zero."""
    positions = potential.example_positions(3, torch.Generator().manual_seed(0)) + 0.2
    energy, forces = potential.energy_and_forces(positions)
    reduced = positions[..., : potential.dimension] / 0.38
    expected = potential.flow.log_prob(reduced) - 3 * potential.dimension * math.log(0.38)
    torch.testing.assert_close(energy, -thermal_energy(120.0) * expected)
    step = 1e-6
    for particle, axis in ((0, 0), (1, 1), (3, 2)):
        moved, back = positions.clone(), positions.clone()
        moved[:, particle, axis] += step
        back[:, particle, axis] -= step
        slope = (potential(moved) - potential(back)) / (2.0 * step)
        torch.testing.assert_close(forces[:, particle, axis], -slope, rtol=1e-5, atol=1e-4)
    assert forces.sum(1).abs().max() < 1e-8


def test_saved_loaded_and_used_by_openmm_and_ase(potential, tmp_path):
    file = tmp_path / "cluster.flow"
    fb.save(potential, file)
    loaded = fb.load(file)
    positions = potential.example_positions(1, torch.Generator().manual_seed(3))
    expected = potential.energy_and_forces(positions)
    assert torch.equal(loaded.energy_and_forces(positions).forces, expected.forces)

    system = particle_system(str(file))
    add_potential(system, str(file))
    context = Context(system, VerletIntegrator(0.001), Platform.getPlatform("Reference"))
    context.setPositions(positions[0].numpy())
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    assert state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) == pytest.approx(expected.energy.item())
    np.testing.assert_allclose(forces, expected.forces[0].numpy(), rtol=1e-6, atol=1e-6)

    atoms = Atoms("Ar4", positions=10.0 * positions[0].numpy())
    atoms.calc = PotentialCalculator(str(file))
    assert atoms.get_potential_energy() / (units.kJ / units.mol) == pytest.approx(expected.energy.item())
    np.testing.assert_allclose(
        atoms.get_forces() / (units.kJ / units.mol / units.nm), expected.forces[0].numpy(), rtol=1e-6, atol=1e-6
    )


def test_every_adapter_agrees(potential):
    """A flow in the plane is no function of rotations about other axes than z."""
    invariances = ("translation", "rotation") if potential.dimension == 3 else ("translation",)
    check_potential(potential, invariances=invariances, configurations=2)
    corners = 0.2 * torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check_potential(LennardJonesCluster(4), corners.double() + 0.02 * noise)


def test_no_engine_compiles_all_steps_unasked(potential):
    """It would take a quarter of an hour."""
    assert accelerated(potential, mode="auto") is potential


@pytest.mark.parametrize("name", SETTINGS)
def test_every_field_is_saved(name, tmp_path):
    flow = EquivariantFlow(argon_like(3), 3, 1.0, SETTINGS[name], Solver(method="dopri5"), length=0.3)
    roughened(flow.flow.field)
    fb.save(flow, tmp_path / "f.flow")
    loaded = fb.load(tmp_path / "f.flow")
    assert loaded.configuration() == flow.configuration()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), flow.parameters(), strict=True))


def test_weights_lead_to_the_target():
    """The mean energy of a small cluster, from an untrained normal, against importance weights of the normal alone."""
    target = LennardJonesCluster(2, length=0.38, temperature=300.0)
    flow = EquivariantFlow(target.metadata.particles, 3, 0.9, GRAPH, Solver(steps=4), length=0.38, temperature=300.0)
    roughened(flow.flow.field, 0.1)
    samples = flow.sample(4000, target, seed=1)
    distances = np.linalg.norm(samples.positions[:, 0] - samples.positions[:, 1], axis=1) / 0.38
    grid = np.linspace(1e-2, 8.0, 8000)
    energy = target.pair_term(torch.from_numpy(grid)).energy.numpy() + 0.25 * grid**2
    weight = grid**2 * np.exp(-energy)
    mean = samples.average(distances)
    assert mean.value == pytest.approx(weight @ grid / weight.sum(), abs=4.5 * mean.error)
    # log of the mean weight is the logarithm of the partition function, per nm^3, with the volume of the relative coordinate
    volume = 4.0 * math.pi * 2.0**1.5 * 0.38**3  # |d x / d r| of the mean-free subspace: x = (r, -r) / 2
    expected = math.log((weight.sum() * (grid[1] - grid[0])) * volume / 8.0)
    found = np.log(np.mean(np.exp(samples.log_weights)))
    assert found == pytest.approx(expected, abs=4.5 * np.std(np.exp(samples.log_weights - found)) / math.sqrt(4000))


def test_hostile_input(potential, tmp_path):
    with pytest.raises(ConfigurationError, match="cell"):
        potential(torch.zeros(1, 4, 3), torch.eye(3)[None])
    for wrong in ({"length": 0.0}, {"dimension": 4}, {"temperature": -1.0}):
        given = {"particles": argon_like(3), "dimension": 3, "scale": 1.0, "field": GRAPH, **wrong}
        with pytest.raises((ConfigurationError, ValueError)):
            EquivariantFlow(**given)
    with pytest.raises(ConfigurationError, match="identical"):
        EquivariantFlow(Particles(("C", "O"), (6, 8), (12.0, 16.0)), 3, 1.0, GRAPH)
    newer = {**potential.configuration(), "revision": 99}
    with pytest.raises(ConfigurationError, match="revision 99"):
        EquivariantFlow.from_configuration(newer)
    file = tmp_path / "cut.flow"
    fb.save(potential, file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelFileError):
        fb.load(file)
