"""Boltzmann generator moves: known populations and distances of a molecule with two wells, and what must stay untouched."""

from dataclasses import dataclass

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

import flowbridge
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm import BoltzmannMove, BoltzmannMover
from flowbridge.integrations.openmm.forces.particles import particles_from_topology
from flowbridge.integrations.openmm.sampling.boltzmann_moves import superposed

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
BOND, BOND_CONSTANT = 0.12, 2.0e4  # nm, kJ/mol/nm^2: soft, so that the r^2 of the volume element shows
ANGLE, ANGLE_CONSTANT = 1.9, 300.0
BARRIER, TILT = 15.0, 1.5  # kJ/mol: wells at +90 and -90 degrees, 12 kT of barrier, 3 kJ/mol apart


@dataclass
class TwoWells:
    """HOOH-like chain of four atoms."""

    topology: app.Topology
    start: np.ndarray
    model: BoltzmannGenerator

    def system(self, *, constraint: bool = False) -> openmm.System:
        system = openmm.System()
        for atom in self.topology.atoms():
            system.addParticle(atom.element.mass)
        bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        for i in range(3):
            bonds.addBond(i, i + 1, BOND, BOND_CONSTANT)
        for i in range(2):
            angles.addAngle(i, i + 1, i + 2, ANGLE, ANGLE_CONSTANT)
        torsion = openmm.CustomTorsionForce("barrier * cos(2 * theta) - tilt * sin(theta)")
        torsion.addGlobalParameter("barrier", BARRIER)
        torsion.addGlobalParameter("tilt", TILT)
        torsion.addTorsion(0, 1, 2, 3, [])
        for force in (bonds, angles, torsion):
            system.addForce(force)
        if constraint:
            system.addConstraint(0, 1, BOND)
        return system

    def simulation(self, seed: int = 1, system: openmm.System | None = None) -> app.Simulation:
        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 5.0, 0.0005)
        integrator.setRandomNumberSeed(seed)
        platform = openmm.Platform.getPlatformByName("Reference")
        simulation = app.Simulation(self.topology, system or self.system(), integrator, platform)
        simulation.context.setPositions(self.start)
        simulation.context.setVelocitiesToTemperature(TEMPERATURE, seed)
        return simulation


def chain(torsion: float) -> np.ndarray:
    """Return positions ``(4, 3)`` nm with a torsion in radians."""
    a, b = np.sin(ANGLE) * BOND, -np.cos(ANGLE) * BOND
    return np.array(
        [[-b, a, 0.0], [0.0, 0.0, 0.0], [BOND, 0.0, 0.0], [BOND + b, a * np.cos(torsion), a * np.sin(torsion)]]
    )


def torsion_of(x: np.ndarray) -> np.ndarray:
    """Return torsions ``(...,)`` in radians of positions ``(..., 4, 3)``."""
    b = np.diff(x, axis=-2)
    first, second = np.cross(b[..., 0, :], b[..., 1, :]), np.cross(b[..., 1, :], b[..., 2, :])
    y = (np.cross(first, second) * b[..., 1, :]).sum(-1) / np.linalg.norm(b[..., 1, :], axis=-1)
    return np.arctan2(y, (first * second).sum(-1))


def population() -> float:
    """Return the exact population of torsions above zero."""
    t = np.linspace(-np.pi, np.pi, 20_001)
    weight = np.exp(-(BARRIER * np.cos(2 * t) - TILT * np.sin(t)) / KT)
    return float(weight[t > 0].sum() / weight.sum())


def mean_bond() -> float:
    """Return the exact mean length of a bond, volume element included."""
    r = np.linspace(0.04, 0.2, 20_001)
    weight = r**2 * np.exp(-0.5 * BOND_CONSTANT * (r - BOND) ** 2 / KT)
    return float((r * weight).sum() / weight.sum())


@pytest.fixture(scope="module")
def wells(tmp_path_factory) -> TwoWells:
    """The molecule, and a generator of it trained for seconds on frames of both wells in equal parts."""
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    elements = (app.element.hydrogen, app.element.oxygen, app.element.oxygen, app.element.hydrogen)
    atoms = [topology.addAtom(f"A{i}", element, residue) for i, element in enumerate(elements)]
    for i in range(3):
        topology.addBond(atoms[i], atoms[i + 1])
    made = TwoWells(topology, chain(-np.pi / 2), None)
    frames = []
    for seed, side in ((1, 1.0), (2, -1.0)):
        simulation = made.simulation(seed)
        simulation.context.setPositions(chain(side * np.pi / 2))
        simulation.step(500)
        for _ in range(400):
            simulation.step(20)
            frames.append(positions_of(simulation.context))
    frames = np.array(frames)
    design = {
        "circular": "soft",
        "torsions": {"couplings": 1, "components": 6, "hidden": [8], "learn_steepness": False},
        "stiff": {"couplings": 2, "hidden": [16]},
    }
    particles = particles_from_topology(topology)
    torch.manual_seed(0)
    model = BoltzmannGenerator.untrained(particles, TEMPERATURE, frames, FlowConfiguration.model_validate(design))
    x = torch.as_tensor(frames)
    optimiser = torch.optim.Adam(model.flow.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimiser.step()
    made.model = model.requires_grad_(False)
    flowbridge.save(model, tmp_path_factory.mktemp("models") / "wells.flow")
    return made


def positions_of(context: openmm.Context) -> np.ndarray:
    return context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)


def velocities_of(context: openmm.Context) -> np.ndarray:
    state = context.getState(velocities=True)
    return state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)


def mean_and_error(values: np.ndarray, blocks: int = 20) -> tuple[float, float]:
    """Return the mean of a correlated series and its standard error from blocks."""
    parts = np.array([part.mean() for part in np.array_split(values, blocks)])
    return float(parts.mean()), float(parts.std(ddof=1) / np.sqrt(blocks))


def test_dynamics_alone_stays_where_it_starts(wells):
    simulation = wells.simulation()
    above = []
    for _ in range(100):
        simulation.step(100)
        above.append(torsion_of(positions_of(simulation.context)) > 0)
    assert not any(above)


def test_populations_from_a_start_in_one_well(wells):
    """As many steps of dynamics as above; the barrier of 12 kT does not matter."""
    simulation = wells.simulation()
    mover = BoltzmannMover(simulation, wells.model, interval=20, proposals=3, seed=2)
    above = []
    for _ in range(1000):
        mover.step(20)
        above.append(torsion_of(positions_of(simulation.context)) > 0)
    share, error = mean_and_error(np.array(above, dtype=float))
    assert error < 0.04
    assert abs(share - population()) < 3.5 * error
    assert mover.statistics.proposed == 3000
    assert mover.statistics.acceptance > 0.3
    assert simulation.currentStep == 20_000


@pytest.mark.parametrize(("scale", "count"), [(1.0, 6000), (0.5, 24_000)])
def test_moves_alone_sample_the_boltzmann_distribution(wells, scale, count):
    """Torsions and bond lengths against exact integrals: the volume element of every coordinate counts."""
    simulation = wells.simulation()
    move = BoltzmannMove(simulation.context, wells.model, scale=scale, seed=3)
    frames = []
    for _ in range(count):
        move.attempt()
        frames.append(positions_of(simulation.context))
    frames = np.array(frames)
    lengths = np.linalg.norm(np.diff(frames, axis=1), axis=2)
    share, share_error = mean_and_error((torsion_of(frames) > 0).astype(float))
    assert share_error < 0.06
    assert abs(share - population()) < 3.5 * share_error
    length, error = mean_and_error(lengths.mean(1))
    assert abs(length - mean_bond()) < 3.5 * error
    without_volume = BOND
    assert abs(length - without_volume) > 5.0 * error
    assert 0.1 < move.statistics.acceptance < 0.99


def test_energies_are_those_of_the_context(wells):
    """After any number of moves the Context holds the configuration that was accepted last."""
    simulation = wells.simulation()
    move = BoltzmannMove(simulation.context, wells.model, seed=4)
    other = wells.simulation()
    for _ in range(20):
        before, velocities = positions_of(simulation.context), velocities_of(simulation.context)
        accepted = move.attempt()
        after = positions_of(simulation.context)
        assert np.array_equal(before, after) == (accepted == 0)
        assert np.array_equal(velocities, velocities_of(simulation.context)) == (accepted == 0)
        other.context.setPositions(after)
        states = [one.context.getState(energy=True).getPotentialEnergy()._value for one in (simulation, other)]
        assert states[0] == states[1]


def test_velocities_after_a_move_have_the_temperature(wells):
    simulation = wells.simulation()
    move = BoltzmannMove(simulation.context, wells.model, seed=5)
    masses = np.array(wells.model.metadata.particles.masses)[:, None]
    kinetic = []
    while len(kinetic) < 400:
        if move.attempt():
            kinetic.append(0.5 * (masses * velocities_of(simulation.context) ** 2).sum())
    mean, error = mean_and_error(np.array(kinetic))
    assert abs(mean - 6.0 * KT) < 3.5 * error


def test_one_seed_one_chain_and_resumption(wells):
    def run(seed: int, *, split: bool = False) -> np.ndarray:
        simulation = wells.simulation()
        mover = BoltzmannMover(simulation, wells.model, interval=5, proposals=2, seed=seed)
        mover.step(25)
        if split:
            positions = simulation.context.createCheckpoint()
            state = mover.move.state_dict()
            mover = BoltzmannMover(simulation, wells.model, interval=5, proposals=2, seed=seed + 77)
            simulation.context.loadCheckpoint(positions)
            mover.move.load_state_dict(state)
        mover.step(25)
        assert mover.statistics.proposed == 20
        return positions_of(simulation.context)

    once = run(1)
    assert np.array_equal(once, run(1))
    assert not np.array_equal(once, run(2))
    assert np.array_equal(once, run(1, split=True))


def test_moves_fall_on_multiples_of_the_interval(wells):
    simulation = wells.simulation()
    mover = BoltzmannMover(simulation, wells.model, interval=10, seed=1)
    for steps, proposed in ((7, 0), (7, 1), (6, 2), (25, 4)):
        mover.step(steps)
        assert mover.statistics.proposed == proposed
    assert simulation.currentStep == 45


def test_superposition_is_undone_by_its_reverse():
    """What makes the placement of proposals reversible."""
    random = np.random.default_rng(1)
    for _ in range(50):
        x, y = random.normal(size=(2, 6, 3))
        weights = random.uniform(0.1, 1.0, 6)
        placed = superposed(y, x, weights)
        assert np.allclose(superposed(x, placed, weights), x, atol=1e-9)
        distances = [np.linalg.norm(z[:, None] - z[None], axis=-1) for z in (y, placed)]
        assert np.allclose(*distances)
        assert np.sign(np.linalg.det(placed[1:4] - placed[0])) == np.sign(np.linalg.det(y[1:4] - y[0]))
        turned = placed + 0.01 * np.cross(random.normal(size=3), placed)
        deviation = [(weights[:, None] * (z - x) ** 2).sum() for z in (placed, turned)]
        assert deviation[0] < deviation[1]


class TestWithinALargerSystem:
    """The molecule among argon atoms in a periodic box."""

    def made(self, wells, barostat: bool = False) -> tuple[app.Simulation, list[int]]:
        system, topology = openmm.System(), app.Topology()
        chain_of = topology.addChain()
        solvent = topology.addResidue("AR", chain_of)
        count, edge = 20, 2.0
        for number in range(count):
            topology.addAtom(f"AR{number}", app.element.argon, solvent)
            system.addParticle(39.948)
        residue = topology.addResidue("HOH", chain_of)
        source = wells.system()
        for atom in wells.topology.atoms():
            topology.addAtom(atom.name, atom.element, residue)
            system.addParticle(atom.element.mass)
        atoms = list(topology.atoms())[count:]
        for i in range(3):
            topology.addBond(atoms[i], atoms[i + 1])
        shifted = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        for i in range(3):
            shifted[0].addBond(count + i, count + i + 1, BOND, BOND_CONSTANT)
        for i in range(2):
            shifted[1].addAngle(count + i, count + i + 1, count + i + 2, ANGLE, ANGLE_CONSTANT)
        torsion = openmm.CustomTorsionForce(source.getForce(2).getEnergyFunction())
        torsion.addGlobalParameter("barrier", BARRIER)
        torsion.addGlobalParameter("tilt", TILT)
        torsion.addTorsion(count, count + 1, count + 2, count + 3, [])
        pairs = openmm.NonbondedForce()
        pairs.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        pairs.setCutoffDistance(0.9)
        for index in range(count + 4):
            pairs.addParticle(0.0, 0.3 if index < count else 0.2, 0.8)
        for i in range(4):
            for j in range(i):
                pairs.addException(count + i, count + j, 0.0, 0.1, 0.0)
        for force in (*shifted, torsion, pairs):
            system.addForce(force)
        if barostat:
            system.addForce(openmm.MonteCarloBarostat(50.0, TEMPERATURE, 5))
        system.setDefaultPeriodicBoxVectors(*(edge * np.eye(3)))
        grid = np.array([[x, y, z] for x in range(3) for y in range(3) for z in range(3)])[:count]
        positions = np.concatenate([0.2 + 0.6 * grid, wells.start + np.array([1.5, 1.4, 1.75])])
        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 5.0, 0.0005)
        integrator.setRandomNumberSeed(1)
        platform = openmm.Platform.getPlatformByName("Reference")
        simulation = app.Simulation(topology, system, integrator, platform)
        simulation.context.setPositions(positions)
        simulation.minimizeEnergy(maxIterations=50)
        return simulation, list(range(count, count + 4))

    @pytest.mark.parametrize("barostat", [False, True])
    def test_only_the_molecule_moves(self, wells, barostat):
        simulation, molecule = self.made(wells, barostat)
        move = BoltzmannMove(simulation.context, wells.model, particles=molecule, topology=simulation.topology, seed=6)
        for _ in range(40):
            simulation.step(10)
            before = positions_of(simulation.context)
            accepted = move.attempt()
            after = positions_of(simulation.context)
            assert np.array_equal(before[:20], after[:20])
            assert np.array_equal(before[20:], after[20:]) == (accepted == 0)
            if accepted:
                masses = np.array(wells.model.metadata.particles.masses)
                assert np.allclose(masses @ before[20:], masses @ after[20:], atol=1e-9)
        assert move.statistics.accepted > 5

    def test_populations(self, wells):
        """Pairs of atoms of the molecule do not see each other, so the torsion's share is nearly that of the free molecule."""
        simulation, molecule = self.made(wells)
        mover = BoltzmannMover(simulation, wells.model, interval=10, proposals=3, particles=molecule, seed=7)
        above = []
        for _ in range(500):
            mover.step(10)
            above.append(torsion_of(positions_of(simulation.context)[20:]) > 0)
        share, error = mean_and_error(np.array(above, dtype=float))
        assert abs(share - population()) < 0.05 + 3.5 * error

    def test_a_broken_molecule_is_refused(self, wells):
        simulation, molecule = self.made(wells)
        positions = positions_of(simulation.context)
        positions[22:, 0] -= 2.0
        simulation.context.setPositions(positions)
        move = BoltzmannMove(simulation.context, wells.model, particles=molecule, seed=8)
        with pytest.raises(ConfigurationError, match=r"broken across the periodic boundary"):
            move.attempt()
        assert np.array_equal(positions_of(simulation.context), positions)


class TestBadInput:
    def test_other_molecule(self, wells, alanine):
        with pytest.raises(MoleculeMismatchError):
            BoltzmannMove(wells.simulation().context, wells.model, particles=[0, 1, 2])
        system = wells.system()
        system.setParticleMass(1, 12.0)
        with pytest.raises(MoleculeMismatchError, match="weighs"):
            BoltzmannMove(wells.simulation(system=system).context, wells.model)

    def test_constraints_and_fixed_particles(self, wells):
        with pytest.raises(ConfigurationError, match="constrains 1 distances"):
            BoltzmannMove(wells.simulation(system=wells.system(constraint=True)).context, wells.model)
        system = wells.system()
        system.setParticleMass(2, 0.0)
        with pytest.raises(ConfigurationError, match="mass 0"):
            BoltzmannMove(wells.simulation(system=system).context, wells.model)

    def test_temperatures(self, wells):
        context = wells.simulation().context
        with pytest.raises(ConfigurationError, match=r"temperature=310.*keeps 300"):
            BoltzmannMove(context, wells.model, temperature=310.0)
        verlet = openmm.Context(wells.system(), openmm.VerletIntegrator(0.001))
        with pytest.raises(ConfigurationError, match="VerletIntegrator has no temperature"):
            BoltzmannMove(verlet, wells.model)
        with pytest.warns(UserWarning, match=r"trained for 300.0 K and proposes at 350.0 K"):
            BoltzmannMove(verlet, wells.model, temperature=350.0)

    @pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
    def test_scale(self, wells, scale):
        with pytest.raises(ConfigurationError, match="scale must be above 0"):
            BoltzmannMove(wells.simulation().context, wells.model, scale=scale)

    def test_anchors(self, wells):
        for anchors in ([0, 1], [0, 1, 4], [-1, 0, 1]):
            with pytest.raises(ConfigurationError, match="anchors must name at least three"):
                BoltzmannMove(wells.simulation().context, wells.model, anchors=anchors)

    def test_numbers(self, wells):
        with pytest.raises(ConfigurationError, match="at least 1, got 0"):
            BoltzmannMover(wells.simulation(), wells.model, interval=0)

    def test_a_potential_that_cannot_be_sampled(self, wells, alanine, tmp_path, morse_file):
        with pytest.raises(ConfigurationError, match=r"holds .*MorseMolecule.*, not a Boltzmann generator"):
            BoltzmannMove(wells.simulation().context, morse_file)

    def test_an_energy_that_is_not_finite(self, wells):
        simulation = wells.simulation()
        simulation.context.setPositions(np.zeros((4, 3)))
        move = BoltzmannMove(simulation.context, wells.model)
        with pytest.raises(NonFiniteEnergyError, match="before a move"):
            move.attempt()

    def test_proposals_without_an_energy_are_rejected_and_counted(self, wells):
        """A force that knows only negative torsions: half of the proposals have none."""
        system = wells.system()
        edge = openmm.CustomTorsionForce("1e-9 * sqrt(-theta)")
        edge.addTorsion(0, 1, 2, 3, [])
        system.addForce(edge)
        simulation = wells.simulation(system=system)
        move = BoltzmannMove(simulation.context, wells.model, seed=9)
        for _ in range(60):
            move.attempt()
            assert torsion_of(positions_of(simulation.context)) < 0
        assert 10 < move.statistics.not_finite < 50
        assert move.statistics.proposed == 60
