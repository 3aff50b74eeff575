"""The force field: forces, symmetry, Lipschitz bound, files, and the same energy everywhere."""

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmm import app

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.compilation.tracing import trace
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.model_files.files import load, save
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.graph_network import GraphConfiguration
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.networks.lipschitz import SpectralBound, project_exactly
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.integrations.mdtraj.bead_selections import write_bead_pdb
from flowbridge.integrations.mdtraj.exports import topology_from_particles
from flowbridge.integrations.openmm import add_potential, particle_system
from flowbridge.integrations.openmm.forces.prior_forces import add_coarse_grained_force_field
from flowbridge.integrations.openmm.sampling.model_dynamics import ModelDynamics, run_model_dynamics
from flowbridge.integrations.openmm.systems.topologies import openmm_topology
from flowbridge.testing import check_potential

NETWORKS = [
    InvariantConfiguration(width=16, depth=2),
    InvariantConfiguration(width=16, depth=3, activation="silu", residual=True),
    GraphConfiguration(width=16, filters=8),
]


def built(bead_frames, network):
    mapping, frames = bead_frames
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(repulsion=3200.0))
    return CoarseGrainedForceField.untrained(prior, network, 300.0, torch.from_numpy(frames)).double().eval()


def openmm_energy(system, positions):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


class TestEnergy:
    @pytest.mark.parametrize("network", NETWORKS, ids=["tanh", "silu", "graph"])
    def test_forces_against_finite_differences(self, bead_frames, network):
        model = built(bead_frames, network)
        x = torch.from_numpy(bead_frames[1][11:12])
        _, forces = model.energy_and_forces(x)
        for bead, axis in ((0, 0), (2, 1), (4, 2)):
            shift = torch.zeros_like(x)
            shift[0, bead, axis] = 1e-6
            slope = (model(x + shift) - model(x - shift)) / 2e-6
            assert torch.isclose(forces[0, bead, axis], -slope[0], rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("network", NETWORKS, ids=["tanh", "silu", "graph"])
    def test_rigid_motion_changes_nothing(self, bead_frames, network):
        model, x = built(bead_frames, network), torch.from_numpy(bead_frames[1][:6])
        q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        turned = x @ (q * torch.linalg.det(q).sign()) + torch.tensor([1.0, -2.0, 0.5])
        assert torch.allclose(model(turned), model(x), atol=1e-8)

    def test_mirror_images_differ(self, bead_frames):
        model, x = built(bead_frames, NETWORKS[0]), torch.from_numpy(bead_frames[1][:6])
        assert not torch.allclose(model(-x), model(x), atol=1e-3)

    def test_a_graph_network_serves_another_sequence(self, bead_frames):
        """The same parameters on a longer chain of the same types, and an error for types that it does not know."""
        network = GraphConfiguration(width=8, filters=4)
        small = built(bead_frames, network)
        mapping, frames = bead_frames
        longer = _doubled(mapping.beads)
        chain = np.concatenate([frames[:40], frames[:40] + np.array([0.0, 0.0, 0.9])], axis=1)
        prior = fit_prior(
            longer, chain + 0.01 * np.random.default_rng(0).standard_normal(chain.shape), 300.0, _NO_BONDS
        )
        other = small.transferred(prior, torch.from_numpy(chain))
        far = chain.copy()
        far[:, 5:] += [0.0, 0.0, 50.0]
        twice = 2.0 * small.network_energy(torch.from_numpy(frames[:4]))
        assert torch.allclose(other.network_energy(torch.from_numpy(far[:4])), twice, atol=1e-8)
        few = network.model_copy(update={"vocabulary": ("ACE:C", "ALA:N", "ALA:C", "NME:N")})
        with pytest.raises(ConfigurationError, match="does not know beads of type ALA:CA"):
            built(bead_frames, few)
        with pytest.raises(ConfigurationError, match="only a graph network"):
            built(bead_frames, NETWORKS[0]).transferred(prior, torch.from_numpy(chain))

    def test_no_cell(self, force_field):
        x = force_field.examples[:1]
        with pytest.raises(ConfigurationError, match="neither a cell"):
            force_field(x, torch.eye(3)[None])


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
@pytest.mark.parametrize("network", NETWORKS[1:], ids=["silu", "graph"])
def test_conformance(bead_frames, network):
    """All that is asked of any potential, through every adapter at hand."""
    model = built(bead_frames, network)
    report = check_potential(model, torch.from_numpy(bead_frames[1][:3]))
    assert len(report.checks) > 8


@pytest.mark.parametrize(("network", "batch"), [(NETWORKS[1], 1), (NETWORKS[0], 16), (NETWORKS[2], 4)])
def test_recorded_for_the_compiler(bead_frames, network, batch):
    """The graph that is compiled gives the same energies and forces, at configurations that it was not recorded with."""
    model = built(bead_frames, network).requires_grad_(False)
    x = torch.from_numpy(bead_frames[1][: 2 * batch])
    program = trace(model, x[:batch], None, ())
    energy, forces = program.module()(x[batch:])
    expected = model.energy_and_forces(x[batch:])
    assert torch.allclose(energy, expected.energy, rtol=1e-10)
    assert torch.allclose(forces, expected.forces, atol=1e-8 * float(expected.forces.abs().max()))


class TestLipschitz:
    def test_projection(self):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(20, 30), torch.nn.Linear(30, 30)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(20.0)
        bound = SpectralBound(layers, 2.0)
        for _ in range(30):
            bound.project()
        assert max(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers) < 2.02
        project_exactly(layers, 2.0)
        assert max(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in layers) <= 2.0 * (1 + 1e-6)

    def test_small_weights_stay(self):
        layer = torch.nn.Linear(5, 5)
        before = layer.weight.detach().clone()
        project_exactly([layer], 10.0)
        SpectralBound([layer], 10.0).project()
        assert torch.equal(layer.weight, before)


class TestDoors:
    """One model, the same energies and forces through every door."""

    @pytest.fixture
    def file(self, force_field, tmp_path):
        save(force_field, tmp_path / "beads.flow")
        return tmp_path / "beads.flow"

    def test_openmm_ase_and_openmm_ml(self, force_field, bead_frames, file):
        import ase

        x = bead_frames[1][23]
        energy, forces = force_field.energy_and_forces(torch.from_numpy(x)[None])
        topology = openmm_topology(force_field.metadata.particles)
        whole, native = particle_system(file), particle_system(file)
        add_potential(whole, file, topology=topology)
        add_coarse_grained_force_field(native, file)
        systems = {"add_potential": whole, "native prior": native}
        try:
            from openmmml import MLPotential
        except ImportError:
            pass
        else:
            systems["openmm-ml"] = MLPotential("flowbridge", modelPath=str(file)).createSystem(topology)
        for name, system in systems.items():
            found, pulled = openmm_energy(system, x)
            assert np.isclose(found, float(energy), rtol=1e-9), name
            assert np.allclose(pulled, forces[0].numpy(), atol=1e-6 * float(forces.abs().max())), name
        atoms = ase.Atoms(numbers=[0] * 5, positions=10.0 * x)
        atoms.calc = PotentialCalculator(file)
        assert np.isclose(atoms.get_potential_energy() / (ase.units.kJ / ase.units.mol), float(energy), rtol=1e-9)

    def test_flowbridge_md_from_a_pdb_of_the_beads(self, force_field, bead_frames, file, tmp_path):
        write_bead_pdb(force_field.metadata.particles, bead_frames[1][0], tmp_path / "beads.pdb")
        run = ModelDynamics(file, tmp_path / "beads.pdb", tmp_path / "out", 40, step_fs=1.0, frame_interval=20)
        end = run_model_dynamics(run)
        assert end.step == 40
        assert np.isfinite(end.potential_energy)

    def test_beads_that_fly_apart_stop_the_run(self, force_field, bead_frames, tmp_path):
        """A bond without a spring: the run names what broke, and what pulls where."""
        weak = force_field.prior
        weak.term("bonds").stiffness[1] = 1e-9
        weak.term("angles").stiffness.zero_()
        weak.term("repulsion").stiffness.zero_()
        save(weak, tmp_path / "weak.flow")
        write_bead_pdb(weak.metadata.particles, bead_frames[1][0], tmp_path / "beads.pdb")
        run = ModelDynamics(
            tmp_path / "weak.flow",
            tmp_path / "beads.pdb",
            tmp_path / "out",
            40_000,
            friction_per_ps=0.1,
            frame_interval=100,
        )
        with pytest.raises(
            NonFiniteEnergyError, match=r"which are bonded, have flown apart.*the largest force.*out\.dcd"
        ):
            run_model_dynamics(run)
        frames = mdtraj.load(str(tmp_path / "out.dcd"), top=str(tmp_path / "beads.pdb"))
        assert 0 < len(frames) < 400

    def test_beads_with_other_names_are_refused(self, force_field, bead_frames, file, tmp_path):
        beads = force_field.metadata.particles
        topology = topology_from_particles(beads)
        list(topology.atoms)[1].name = "XX"
        mdtraj.Trajectory(bead_frames[1][:1].astype(np.float32), topology).save_pdb(str(tmp_path / "other.pdb"))
        pdb = app.PDBFile(str(tmp_path / "other.pdb"))
        for atom in pdb.topology.atoms():
            atom.element = app.Element.getBySymbol("C")
        with pytest.raises(MoleculeMismatchError, match="particle 1 of the topology"):
            add_potential(particle_system(file), file, topology=pdb.topology)

    def test_saved_and_loaded(self, force_field, bead_frames, file):
        x = torch.from_numpy(bead_frames[1][:5])
        again = load(file)
        assert torch.equal(again(x), force_field(x))
        assert torch.equal(again.example_positions(3, torch.Generator().manual_seed(1)),
                           force_field.example_positions(3, torch.Generator().manual_seed(1)))  # fmt: skip


_NO_BONDS = PriorConfiguration(bonds="none", angles="none")


def _doubled(beads):
    from flowbridge.core.potential import Particles

    return Particles(
        beads.names * 2,
        beads.atomic_numbers * 2,
        beads.masses * 2,
        beads.bonds + tuple((i + 5, j + 5) for i, j in beads.bonds),
        beads.residue_names * 2,
        (*beads.residue_indices, *(index + 3 for index in beads.residue_indices)),
    )
