"""Networks of other libraries, from their published packages: their own numbers, in OpenMM and ASE."""

import ase
import numpy as np
import pytest
import torch
from ase import units
from openmm_contexts import context_of, evaluate
from torch import nn

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.potential import Particles
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.beads.mappings import five_beads
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.forcefields.training.augmented_flow import TeacherConfiguration
from flowbridge.forcefields.training.configuration import CoarseTrainingConfiguration
from flowbridge.forcefields.training.fitting import train_force_field
from flowbridge.integrations.external_networks import ExternalNetwork, NetworkPotential, Structures
from flowbridge.integrations.openmm import add_potential, particle_system

FORMALDEHYDE = Particles(("C", "O", "H1", "H2"), (6, 8, 1, 1), (12.011, 15.999, 1.008, 1.008))
POSITIONS = np.array([[0.0, 0.0, 0.0], [0.121, 0.0, 0.0], [-0.054, 0.093, 0.01], [-0.055, -0.094, 0.0]])  # nm
KILOJOULE, NM = units.kJ / units.mol, units.nm
unsaved = pytest.mark.filterwarnings("ignore:this potential is in no model file")


class Pairs(nn.Module):
    """A network of no library: Gaussians of distances in Angstrom, energies in kcal/mol."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def energies(self, structures: Structures) -> torch.Tensor:
        first, second = structures.pairs(3.0)
        r = (structures.positions[first] - structures.positions[second]).norm(dim=1)
        terms = torch.exp(-((r[:, None] - torch.linspace(0.5, 3.0, 8, dtype=r.dtype)) ** 2)) @ self.weights
        smooth = terms * (1.0 - r / 3.0) ** 2 / (structures.types[first] + structures.types[second])
        return torch.zeros(structures.copies, dtype=r.dtype).index_add(0, structures.molecule[first], smooth)


def call_pairs(network, structures):
    return network.energies(structures)


def own():
    """A network that is called by a function."""
    network = Pairs()
    found = NetworkPotential(network, FORMALDEHYDE, energy="kcal/mol", evaluate=call_pairs)

    def expected(x):
        energy = 0.0
        z = FORMALDEHYDE.atomic_numbers
        for i in range(4):
            for j in range(4):
                r = np.linalg.norm(x[i] - x[j]) * 10.0
                if i != j and r < 3.0:
                    terms = np.exp(-((r - np.linspace(0.5, 3.0, 8)) ** 2)) @ network.weights.detach().numpy()
                    energy += terms * (1.0 - r / 3.0) ** 2 / (z[i] + z[j])
        return energy * 4.184, None

    return found, expected


def torchmdnet():
    """TorchMD-Net differentiates its energy itself; the units are for its user to know."""
    pytest.importorskip("torchmdnet", reason="TorchMD-Net is not installed: pip install torchmd-net warp-lang")
    from torchmdnet.models.model import create_model

    torch.manual_seed(1)
    network = create_model(
        {
            "model": "tensornet", "embedding_dimension": 16, "num_layers": 1, "num_rbf": 8, "rbf_type": "expnorm",
            "trainable_rbf": False, "activation": "silu", "cutoff_lower": 0.0, "cutoff_upper": 5.0, "max_z": 10,
            "max_num_neighbors": 32, "equivariance_invariance_group": "O(3)", "static_shapes": False, "check_errors": True,
            "derivative": True, "prior_model": None, "output_model": "Scalar", "reduce_op": "add", "precision": 64,
            "atom_filter": -1,
        }
    )  # fmt: skip

    def expected(x):
        energy, forces = network(torch.tensor(FORMALDEHYDE.atomic_numbers), torch.as_tensor(10.0 * x))
        return energy.item() / KILOJOULE, forces.detach().numpy() * 10.0 / KILOJOULE

    return NetworkPotential(network.eval(), FORMALDEHYDE), expected


def schnetpack():
    """SchNetPack, a PaiNN with the module that gives forces."""
    try:
        import schnetpack
        from schnetpack import atomistic, representation
        from schnetpack.nn import GaussianRBF
        from schnetpack.nn.cutoff import CosineCutoff
    except ImportError as error:
        pytest.skip(f"SchNetPack is not installed, or not for this torch: {error}")

    torch.manual_seed(1)
    network = schnetpack.model.NeuralNetworkPotential(
        representation.PaiNN(16, 2, GaussianRBF(8, 5.0), CosineCutoff(5.0)),
        input_modules=[atomistic.PairwiseDistances()],
        output_modules=[atomistic.Atomwise(16, output_key="energy"), atomistic.Forces()],
    ).double()

    def expected(x):
        i, j = (a.flatten() for a in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        inputs = {
            "_positions": torch.as_tensor(10.0 * x), "_atomic_numbers": torch.tensor(FORMALDEHYDE.atomic_numbers),
            "_idx_m": torch.zeros(4, dtype=torch.long), "_idx_i": i[i != j], "_idx_j": j[i != j],
            "_offsets": torch.zeros(12, 3, dtype=torch.float64), "_n_atoms": torch.tensor([4]),
        }  # fmt: skip
        found = network(inputs)
        return found["energy"].item() / KILOJOULE, found["forces"].detach().numpy() * 10.0 / KILOJOULE

    return NetworkPotential(network.eval(), FORMALDEHYDE), expected


def mace_network():
    pytest.importorskip("mace", reason="MACE is not installed: pip install mace-torch")
    from e3nn import o3
    from mace import modules

    torch.manual_seed(1)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    network = modules.ScaleShiftMACE(
        r_max=4.0, num_bessel=4, num_polynomial_cutoff=5, max_ell=1, interaction_cls=block, interaction_cls_first=block,
        num_interactions=2, num_elements=3, hidden_irreps=o3.Irreps("4x0e + 4x1o"), MLP_irreps=o3.Irreps("4x0e"),
        atomic_energies=np.array([-13.0, -1000.0, -2000.0]), avg_num_neighbors=3.0, atomic_numbers=[1, 6, 8],
        correlation=2, gate=nn.functional.silu, atomic_inter_scale=1.0, atomic_inter_shift=0.0, radial_MLP=[8],
    )  # fmt: skip
    return network.double()


def mace():
    """MACE, against its own ASE calculator."""
    network = mace_network()
    from mace.calculators import MACECalculator

    calculator = MACECalculator(models=[network], device="cpu", default_dtype="float64")

    def expected(x):
        atoms = ase.Atoms(FORMALDEHYDE.atomic_numbers, x * NM, calculator=calculator)
        return atoms.get_potential_energy() / KILOJOULE, atoms.get_forces() * NM / KILOJOULE

    return NetworkPotential(network, FORMALDEHYDE), expected


@pytest.fixture(params=[own, torchmdnet, schnetpack, mace], ids=lambda make: make.__name__, scope="module")
def pair(request):
    return request.param()


def shaken(count: int) -> np.ndarray:
    return POSITIONS + np.random.default_rng(4).normal(scale=0.005, size=(count, 4, 3))


def test_numbers_are_those_of_the_library(pair):
    potential, expected = pair
    frames = shaken(5)
    found = potential.energy_and_forces(torch.as_tensor(frames))
    for x, energy, forces in zip(frames, found.energy, found.forces, strict=True):
        known, known_forces = expected(x)
        assert float(energy) == pytest.approx(known, rel=1e-10)
        if known_forces is not None:
            scale = np.abs(known_forces).max()
            assert np.abs(forces.numpy() - known_forces).max() < 1e-8 * scale


def test_forces_are_the_gradient(pair):
    potential, _ = pair
    x = torch.as_tensor(shaken(1))
    forces = potential.energy_and_forces(x).forces[0]
    size, step = float(forces.abs().max()), 1e-6
    assert size > 1e-3
    for atom, axis in ((0, 0), (1, 1), (2, 2), (3, 0)):
        ends = []
        for sign in (1.0, -1.0):
            moved = x.clone()
            moved[0, atom, axis] += sign * step
            ends.append(potential(moved).item())
        assert -(ends[0] - ends[1]) / (2.0 * step) == pytest.approx(float(forces[atom, axis]), abs=1e-4 * size)


@unsaved
def test_engines_agree(pair):
    potential, expected = pair
    known, _ = expected(POSITIONS)
    atoms = ase.Atoms(FORMALDEHYDE.atomic_numbers, POSITIONS * NM, calculator=PotentialCalculator(potential))
    assert atoms.get_potential_energy() / KILOJOULE == pytest.approx(known, rel=1e-10)
    system = particle_system(potential)
    add_potential(system, potential)
    energy, forces = evaluate(context_of(system), POSITIONS)
    assert energy == pytest.approx(known, rel=1e-10)
    largest = np.abs(forces).max()
    np.testing.assert_allclose(atoms.get_forces() * NM / KILOJOULE, forces, atol=1e-8 * largest)


def test_parameters_are_shared():
    potential, expected = own()
    with torch.no_grad():
        potential.network.network.weights.mul_(2.0)
    assert potential(torch.as_tensor(POSITIONS[None])).item() == pytest.approx(expected(POSITIONS)[0], rel=1e-10)


def test_settings_are_restored():
    made, _ = torchmdnet()
    made(torch.as_tensor(POSITIONS[None]))
    assert made.network.network.derivative


def beads_of(frames: torch.Tensor, mapping) -> CoarseGrainedForceField:
    prior = fit_prior(mapping.beads, frames.numpy(), 300.0, PriorConfiguration(torsion_harmonics=2))
    network = ExternalNetwork(Pairs(), mapping.beads, types=range(1, 6), evaluate=call_pairs)
    return CoarseGrainedForceField.untrained(prior, network, 300.0, frames)


@pytest.fixture
def bead_frames(alanine):
    mapping = five_beads(alanine.particles)
    return mapping, mapping.positions(alanine.shaken(400, 0.01))


def test_a_prior_is_added(bead_frames):
    mapping, frames = bead_frames
    x = torch.from_numpy(frames[:4])
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(torsion_harmonics=2))
    settings = {"energy": "kT", "types": range(1, 6), "evaluate": call_pairs}
    both = NetworkPotential(Pairs(), mapping.beads, prior=prior, **settings)
    alone = NetworkPotential(Pairs(), mapping.beads, temperature=300.0, **settings)
    assert both.metadata.temperature == 300.0
    assert torch.allclose(both(x), alone(x) + prior(x), rtol=1e-12)
    assert torch.allclose(beads_of(torch.from_numpy(frames), mapping)(x), both(x), rtol=1e-12)
    with pytest.raises(
        ConfigurationError, match=r"the prior is of 5 particles .* the network of 4 particles \(C, O, H1, H2\)"
    ):
        NetworkPotential(Pairs(), FORMALDEHYDE, prior=prior, evaluate=call_pairs)
    with pytest.raises(ConfigurationError, match="kT need a temperature"):
        NetworkPotential(Pairs(), FORMALDEHYDE, energy="kT", evaluate=call_pairs)


def test_an_external_network_learns_forces(bead_frames, tmp_path):
    """Labels of a network whose parameters are known: training from others finds its forces."""
    mapping, frames = bead_frames
    x = torch.from_numpy(frames)
    truth = beads_of(x, mapping)
    labels = BeadFrames(x, truth.energy_and_forces(x).forces)
    start = Pairs()
    with torch.no_grad():
        start.weights.mul_(-0.5)
    network = ExternalNetwork(start, mapping.beads, types=range(1, 6), evaluate=call_pairs)
    settings = CoarseTrainingConfiguration.model_validate(
        {"method": "force_matching", "student": {"steps": 150, "batch": 64, "learning_rate": 0.05}}
    )
    result = train_force_field(
        mapping.beads, labels, 300.0, PriorConfiguration(torsion_harmonics=2), network, TeacherConfiguration(), settings,
        tmp_path, 1,
    )  # fmt: skip
    assert result.metadata["held_out_force_error"] < 0.05
    with pytest.raises(ConfigurationError, match="holds a ExternalNetwork of another library"):
        result.force_field.configuration()


class TestBadInput:
    def test_unknown_library(self):
        with pytest.raises(
            ConfigurationError, match=r"a Linear of torch\.nn.* is no network of TorchMD-Net.*evaluate="
        ):
            NetworkPotential(nn.Linear(3, 1), FORMALDEHYDE)

    def test_beads_without_types(self):
        beads = Particles(("B1", "B2"), (0, 0), (50.0, 50.0))
        with pytest.raises(ConfigurationError, match=r"B1 .* is no chemical element: give types="):
            NetworkPotential(Pairs(), beads, evaluate=call_pairs)
        with pytest.raises(ConfigurationError, match="types has 3 numbers for 2 particles"):
            NetworkPotential(Pairs(), beads, types=(1, 2, 3), evaluate=call_pairs)

    def test_energies_that_are_none(self):
        def by_atom(network, structures):
            return structures.positions.sum(1)

        with pytest.raises(ConfigurationError, match=r"shape \(8,\) for 2 molecules"):
            NetworkPotential(Pairs(), FORMALDEHYDE, evaluate=by_atom)

        def constant(network, structures):
            return torch.zeros(structures.copies)

        with pytest.raises(ConfigurationError, match="has no forces"):
            NetworkPotential(Pairs(), FORMALDEHYDE, evaluate=constant)

        def failing(network, structures):
            raise IndexError("type 8 is out of range")

        with pytest.raises(ConfigurationError, match=r"types \[1, 6, 8\]: IndexError: type 8 is out of range"):
            NetworkPotential(Pairs(), FORMALDEHYDE, evaluate=failing)

    def test_units(self):
        with pytest.raises(ConfigurationError, match="length must be one of angstrom, nm, bohr, got 'metre'"):
            NetworkPotential(Pairs(), FORMALDEHYDE, length="metre", evaluate=call_pairs)
        with pytest.raises(ConfigurationError, match=r"energy must be one of eV, .*, got 'calories'"):
            NetworkPotential(Pairs(), FORMALDEHYDE, energy="calories", evaluate=call_pairs)
        potential = NetworkPotential(Pairs(), FORMALDEHYDE, evaluate=call_pairs)
        with pytest.raises(ConfigurationError, match="neither a cell"):
            potential(torch.as_tensor(POSITIONS[None]), torch.eye(3)[None])

    def test_elements_that_mace_does_not_know(self):
        argon = Particles(("Ar", "O"), (18, 8), (39.948, 15.999))
        with pytest.raises(ConfigurationError, match=r"knows elements \[1, 6, 8\], not \[18\]"):
            NetworkPotential(mace_network(), argon)
        with pytest.raises(ConfigurationError, match="no head 'metals'"):
            NetworkPotential(mace_network(), FORMALDEHYDE, head="metals")
