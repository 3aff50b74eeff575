"""Z-matrices of molecules of every shape: complete, in order, exact in both directions and in volume."""

import mdtraj
import networkx
import numpy as np
import pytest
import torch

from flowbridge.core.errors import ConfigurationError, CoordinateError
from flowbridge.core.potential import Particles
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.internal_coordinates import InternalCoordinates, torsion
from flowbridge.flows.boltzmann.molecule_coordinates import MoleculeCoordinates
from flowbridge.flows.boltzmann.zmatrix import build_zmatrix, refuse_linear

MOLECULES = {
    "water": ("O", True),
    "ammonia": ("N", True),
    "methane": ("C", True),
    "hydrogen peroxide": ("OO", True),
    "ethane": ("CC", True),
    "decane": ("CCCCCCCCCC", True),
    "heptane without hydrogens": ("CCCCCCC", False),
    "propane without hydrogens": ("CCC", False),
    "neopentane": ("CC(C)(C)C", True),
    "isobutane": ("CC(C)C", True),
    "branched alcohol": ("CC(C)C(O)C(C)(C)CO", True),
    "sulfuric acid": ("OS(=O)(=O)O", True),
    "cyclopropane": ("C1CC1", True),
    "cyclopropane without hydrogens": ("C1CC1", False),
    "cyclohexane": ("C1CCCCC1", True),
    "benzene": ("c1ccccc1", True),
    "benzene without hydrogens": ("c1ccccc1", False),
    "naphthalene": ("c1ccc2ccccc2c1", True),
    "norbornane": ("C1CC2CCC1C2", True),
    "spiro[3.4]octane": ("C1CCC2(C1)CCC2", True),
    "proline dipeptide": ("CC(=O)N1CCCC1C(=O)NC", True),
    "cubane": ("C12C3C4C1C5C2C3C45", True),
    "adamantane": ("C1C2CC3CC1CC(C2)C3", True),
    "glycine zwitterion": ("[NH3+]CC([O-])=O", True),
    "ammonium": ("[NH4+]", True),
    "tetramethylammonium without hydrogens": ("C[N+](C)(C)C", False),
}
every_molecule = pytest.mark.parametrize("name", MOLECULES)


@pytest.fixture(scope="module")
def molecule(from_smiles):
    return lambda name: from_smiles(*MOLECULES[name])


def shaken(positions: np.ndarray, count: int = 3, amplitude: float = 0.008) -> torch.Tensor:
    noise = np.random.default_rng(0).standard_normal((count, *positions.shape))
    return torch.as_tensor(positions + amplitude * noise)


def distances(x: torch.Tensor) -> torch.Tensor:
    """All distances; the default of cdist goes through a matrix product that loses half of the digits."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def shuffled(particles: Particles, positions: np.ndarray, seed: int) -> tuple[Particles, np.ndarray]:
    """Return the same molecule with its atoms and its bonds in another order."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(particles))
    place = np.argsort(order)
    bonds = [(int(place[i]), int(place[j])) for i, j in particles.bonds]
    random.shuffle(bonds)
    names = tuple(particles.names[i] for i in order)
    numbers = tuple(particles.atomic_numbers[i] for i in order)
    masses = tuple(particles.masses[i] for i in order)
    return Particles(names, numbers, masses, tuple(bonds)), positions[order]


def require_complete(particles: Particles) -> None:
    """Check that each atom is placed once, with references that came before and are distinct, along bonds."""
    zmatrix = build_zmatrix(particles)
    n = len(particles)
    assert sorted([zmatrix.origin, *(row.atom for row in zmatrix.rows)]) == list(range(n))
    bonds = {frozenset(bond) for bond in particles.bonds}
    placed = [zmatrix.origin]
    for number, row in enumerate(zmatrix.rows):
        references = [row.bond, row.angle, row.torsion][: min(number + 1, 3)]
        assert set(references) <= set(placed)
        assert len({row.atom, *references}) == len(references) + 1
        assert frozenset((row.atom, row.bond)) in bonds
        if number >= 1:
            assert frozenset((row.bond, row.angle)) in bonds
        if number >= 2:
            # a proper torsion goes on along the chain, a relative one measures from an atom on the same centre
            assert frozenset((row.torsion, row.bond if row.relative else row.angle)) in bonds
        placed.append(row.atom)
    assert sum((row.angle >= 0) + (row.torsion >= 0) + 1 for row in zmatrix.rows) == 3 * n - 6
    assert InternalCoordinates(zmatrix).dimension == 3 * n - 6
    levels = zmatrix.levels()
    assert sorted(index for level in levels for index in level) == list(range(2, n - 1))
    known = {zmatrix.origin, zmatrix.rows[0].atom, zmatrix.rows[1].atom}
    for level in levels:
        rows = [zmatrix.rows[index] for index in level]
        assert all({row.bond, row.angle, row.torsion} <= known for row in rows)
        known |= {row.atom for row in rows}


def require_exact(particles: Particles, positions: np.ndarray) -> None:
    """Check that positions survive the round trip up to a proper rigid motion."""
    internal = InternalCoordinates(build_zmatrix(particles))
    x = shaken(positions)
    point, down = internal.inverse(x)
    rebuilt, up = internal(point)
    assert float((distances(rebuilt) - distances(x)).abs().max()) < 1e-10
    again, _ = internal.inverse(rebuilt)
    for old, new in zip(point, again, strict=True):
        difference = torch.remainder(new - old + torch.pi, 2 * torch.pi) - torch.pi
        assert difference.numel() == 0 or float(difference.abs().max()) < 1e-9
    assert torch.allclose(up, -down, atol=1e-11)
    assert point.bonds.shape[1] + point.angles.shape[1] + point.torsions.shape[1] == 3 * len(particles) - 6
    if len(particles) > 3:  # the same handedness, not the mirror image, which has the same distances
        i, j, k, m = (internal.zmatrix.origin, *(row.atom for row in internal.zmatrix.rows[:3]))

        def volume(y: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(y[:, [j, k, m]] - y[:, [i]])

        assert torch.allclose(volume(rebuilt), volume(x), atol=1e-14)


@every_molecule
def test_every_atom_is_placed_after_its_references(molecule, name):
    require_complete(molecule(name)[0])


@every_molecule
def test_positions_survive_the_round_trip(molecule, name):
    require_exact(*molecule(name))


@every_molecule
def test_any_order_of_the_atoms_will_do(molecule, name):
    for seed in range(4):
        particles, positions = shuffled(*molecule(name), seed)
        require_complete(particles)
        require_exact(particles, positions)


def test_large_molecules_of_random_shape():
    """Trees and rings that no chemist would draw: only the graph counts."""
    for seed in range(6):
        random = np.random.default_rng(seed)
        graph = networkx.random_labeled_tree(40, seed=seed)
        graph.add_edges_from(random.choice(40, (6, 2), replace=False))
        graph.remove_edges_from(networkx.selfloop_edges(graph))
        names, bonds = tuple(f"X{i}" for i in range(40)), tuple((int(i), int(j)) for i, j in graph.edges)
        particles = Particles(names, tuple(random.integers(1, 9, 40).tolist()), (12.0,) * 40, bonds)
        require_complete(particles)
        require_exact(particles, random.standard_normal((40, 3)))


@pytest.mark.parametrize(
    "name", ["water", "hydrogen peroxide", "ammonia", "cyclopropane", "glycine zwitterion", "isobutane"]
)
def test_log_volume_with_rigid_motion_is_the_whole_jacobian(molecule, name):
    """``x = exp(omega) y(q) + t``: with the six rigid coordinates the determinant agrees, constant included."""
    particles, positions = molecule(name)
    internal = InternalCoordinates(build_zmatrix(particles))
    bonds, angles = len(particles) - 1, len(particles) - 2
    point, log_det = internal.inverse(shaken(positions, 2))

    def place(q: torch.Tensor) -> torch.Tensor:
        omega, shift, rest = q[:3], q[3:6], q[6:]
        parts = rest[None].split([bonds, angles, len(rest) - bonds - angles], 1)
        y, _ = internal(type(point)(*parts))
        zero = torch.zeros((), dtype=q.dtype)
        a, b, c = omega
        spin = torch.stack([torch.stack([zero, -c, b]), torch.stack([c, zero, -a]), torch.stack([-b, a, zero])])
        return (y[0] @ torch.linalg.matrix_exp(spin).T + shift).flatten()

    for row in range(2):
        q = torch.cat([torch.zeros(3), torch.tensor([0.3, -0.2, 0.1]), *(part[row] for part in point)]).double()
        jacobian = torch.autograd.functional.jacobian(place, q)
        assert jacobian.shape == (3 * len(particles),) * 2
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(-float(log_det[row]), abs=1e-9)


@every_molecule
def test_torsions_have_the_iupac_sign_and_flip_in_the_mirror(molecule, name):
    particles, positions = molecule(name)
    internal = InternalCoordinates(build_zmatrix(particles))
    x = shaken(positions, 4)
    mirrored, _ = internal.inverse(x * torch.tensor([1.0, 1.0, -1.0]))
    point, _ = internal.inverse(x)
    assert torch.allclose(mirrored.torsions, -point.torsions, atol=1e-10)
    assert torch.allclose(mirrored.angles, point.angles, atol=1e-12)
    if len(particles) == 3:
        assert point.torsions.shape == (4, 0)
        return
    topology = mdtraj.Topology()
    residue = topology.add_residue("MOL", topology.add_chain())
    for atom in particles.names:
        topology.add_atom(atom, mdtraj.element.carbon, residue)
    trajectory = mdtraj.Trajectory(x.numpy(), topology)
    expected = mdtraj.compute_dihedrals(trajectory, internal.torsion_atoms.numpy())  # in float32
    difference = np.angle(np.exp(1j * (point.torsions.numpy() - expected)))
    assert np.abs(difference).max() < 1e-4


def test_a_right_handed_screw_has_a_positive_torsion():
    """IUPAC: looking along the middle bond, the far bond clockwise from the near one is positive."""
    i, j, k, m = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, -0.5, 1.0]])[:, None, None]
    clockwise_seen_along_z = torsion(i - j, k - j, m - k)
    # Along +z with x to the right, y points down when the observer sits at negative z: -y is counter-clockwise.
    assert float(clockwise_seen_along_z) == pytest.approx(-np.pi / 4)


def test_siblings_are_measured_from_each_other_and_rotors_turn_hydrogens_only(from_smiles):
    particles, _ = from_smiles("CCC(C)O")
    zmatrix = build_zmatrix(particles)
    element = dict(enumerate(particles.atomic_numbers))
    rows = [row for row in zmatrix.rows if row.torsion >= 0]
    axes: dict[tuple[int, int], list] = {}
    for row in rows:
        axes.setdefault((row.bond, row.angle), []).append(row)
    for (centre, parent), group in axes.items():
        absolute = [row for row in group if not row.relative]
        if centre == zmatrix.origin:
            assert not absolute
            continue
        # one atom on each rotatable bond carries its torsion, the others follow it
        assert len(absolute) == 1
        leader = absolute[0]
        for row in group:
            if row.relative:
                assert row.torsion == leader.atom
                assert row.angle == parent
                assert not row.rotor
        assert leader.rotor == all(element[row.atom] == 1 for row in group)
        if any(element[row.atom] != 1 for row in group):
            assert element[leader.atom] != 1
    # methyl, methyl, hydroxyl: three rotors; the carbon chain has one more rotatable bond or passes through the origin
    assert sum(row.rotor for row in rows) == 3


def test_turning_a_leading_torsion_turns_the_whole_group(from_smiles):
    particles, positions = from_smiles("CCO")
    internal = InternalCoordinates(build_zmatrix(particles))
    point, _ = internal.inverse(torch.as_tensor(positions)[None])
    rows = [row for row in internal.zmatrix.rows if row.torsion >= 0]
    index = next(i for i, row in enumerate(rows) if row.rotor and sum(r.bond == row.bond for r in rows) == 3)
    turned = point.torsions.clone()
    turned[:, index] += 2 * torch.pi / 3
    before, after = internal(point).value[0], internal(point._replace(torsions=turned)).value[0]
    moved = torch.linalg.vector_norm(after - before, dim=-1) > 1e-6
    group = {row.atom for row in rows if row.bond == rows[index].bond}
    assert set(torch.nonzero(moved).flatten().tolist()) == group
    members = sorted(group)
    assert torch.allclose(distances(before[members]), distances(after[members]))


@pytest.mark.parametrize(
    ("smiles", "centre"),
    [("CC#N", "C1"), ("O=C=O", "C1"), ("C#C", "C[01]"), ("CC#CC", "C[12]"), ("C=C=C", "C1"), ("C#N", "C0")],
)
def test_linear_groups_are_refused_by_name(from_smiles, smiles, centre):
    particles, positions = from_smiles(smiles)
    with pytest.raises(CoordinateError, match=rf"^{centre} \(atom .* bonded linearly: the angle .* degrees"):
        refuse_linear(build_zmatrix(particles), positions[None], particles)


def test_a_linear_group_is_recognised_although_it_bends_in_every_frame(from_smiles):
    """The first frame of a trajectory at 300 K is rarely within five degrees of the line."""
    particles, positions = from_smiles("CC#N")
    random = np.random.default_rng(1)
    frames = positions + 0.004 * random.standard_normal((400, *positions.shape))
    frames[0, 2] += 0.03 * np.linalg.svd(positions[[2]] - positions[[1]])[2][1]
    with pytest.raises(CoordinateError, match="bonded linearly"):
        MoleculeCoordinates.fit(particles, frames, FlowConfiguration())


@pytest.mark.parametrize("smiles", ["O", "C1CC1", "c1ccccc1", "OO"])
def test_bent_groups_are_not_refused(from_smiles, smiles):
    particles, positions = from_smiles(smiles)
    refuse_linear(build_zmatrix(particles), positions[None], particles)


def test_pieces_are_refused_by_name(from_smiles):
    particles, _ = from_smiles("CCO")
    loose = Particles(
        particles.names, particles.atomic_numbers, particles.masses, tuple(b for b in particles.bonds if 2 not in b)
    )
    with pytest.raises(CoordinateError, match=r"O2 \(atom 2 of MOL 1\) is not bonded to the rest .*3 pieces"):
        build_zmatrix(loose)
    unbonded = Particles(particles.names, particles.atomic_numbers, particles.masses)
    with pytest.raises(CoordinateError, match=r"is not bonded to the rest .*9 pieces for 9 atoms"):
        build_zmatrix(unbonded)


def test_two_atoms_are_too_few():
    with pytest.raises(CoordinateError, match="at least three atoms, this molecule has 2"):
        build_zmatrix(Particles(("H1", "H2"), (1, 1), (1.0, 1.0), ((0, 1),)))


def test_too_few_frames_are_refused(from_smiles, frames_of):
    particles, positions = from_smiles("CCO")
    with pytest.raises(ConfigurationError, match="frames"):
        MoleculeCoordinates.fit(particles, frames_of(particles, positions, 5), FlowConfiguration())
