"""Molecules from SMILES, frames of them with every kind of motion, and a potential that costs nothing."""

import functools
import math

import networkx
import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

from flowbridge.core.potential import Particles, Potential, PotentialMetadata
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.internal_coordinates import InternalCoordinates, InternalPoint
from flowbridge.flows.boltzmann.zmatrix import build_zmatrix


def _from_smiles(smiles: str, hydrogens: bool = True) -> tuple[Particles, np.ndarray]:
    """Return particles and relaxed positions ``(N, 3)`` in nm."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(molecule, randomSeed=7) == 0
    AllChem.UFFOptimizeMolecule(molecule, maxIters=2000)
    kept = [atom.GetIdx() for atom in molecule.GetAtoms() if hydrogens or atom.GetAtomicNum() != 1]
    new = {old: index for index, old in enumerate(kept)}
    atoms = [molecule.GetAtomWithIdx(i) for i in kept]
    particles = Particles(
        names=tuple(f"{atom.GetSymbol()}{new[atom.GetIdx()]}" for atom in atoms),
        atomic_numbers=tuple(atom.GetAtomicNum() for atom in atoms),
        masses=tuple(atom.GetMass() for atom in atoms),
        bonds=tuple(
            (new[bond.GetBeginAtomIdx()], new[bond.GetEndAtomIdx()])
            for bond in molecule.GetBonds()
            if bond.GetBeginAtomIdx() in new and bond.GetEndAtomIdx() in new
        ),
    )
    return particles, molecule.GetConformer().GetPositions()[kept] / 10.0


def _frames(particles: Particles, positions: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return ``(count, N, 3)`` nm: bonds, angles and relative torsions vibrate, all other torsions turn freely."""
    zmatrix = build_zmatrix(particles)
    internal = InternalCoordinates(zmatrix)
    generator = torch.Generator().manual_seed(seed)
    point, _ = internal.inverse(torch.as_tensor(positions)[None])
    relative = [row.relative for row in zmatrix.rows if row.torsion >= 0]

    def around(centre: torch.Tensor, deviation: float) -> torch.Tensor:
        noise = torch.randn(count, centre.shape[1], generator=generator, dtype=torch.float64)
        return centre + deviation * noise

    free = 2.0 * math.pi * torch.rand(count, len(relative), generator=generator, dtype=torch.float64)
    torsions = torch.where(torch.tensor(relative, dtype=torch.bool), around(point.torsions, 0.08), free)
    x, _ = internal(InternalPoint(around(point.bonds, 0.003), around(point.angles, 0.04), torsions))
    return x.numpy()


class Springs(Potential):
    """Harmonic springs between all pairs of atoms: invariant, in closed form, with every force that a molecule has."""

    def __init__(self, particles: Particles, positions: np.ndarray) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(particles, temperature=300.0)
        x = torch.as_tensor(positions)
        self.first, self.second = torch.triu_indices(len(particles), len(particles), 1)
        self.lengths = torch.linalg.vector_norm(x[self.first] - x[self.second], dim=-1)
        apart = dict(networkx.all_pairs_shortest_path_length(networkx.Graph(particles.bonds)))
        stiffness = {1: 3.0e5, 2: 6.0e5}  # bonds and angles as in the frames; what turns is held by next to nothing
        pairs = zip(self.first.tolist(), self.second.tolist(), strict=True)
        constants = [stiffness.get(apart[i][j], 200.0) for i, j in pairs]
        self.constants = torch.tensor(constants, dtype=torch.float64)

    def forward(self, positions, cell=None, **global_parameters):
        separation = torch.linalg.vector_norm(positions[:, self.first] - positions[:, self.second], dim=-1)
        return (0.5 * self.constants * (separation - self.lengths).square()).sum(-1).double()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are so small that a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def from_smiles():
    """Function: SMILES (and whether to keep hydrogens) to particles and positions ``(N, 3)`` nm."""
    return functools.lru_cache(_from_smiles)


@pytest.fixture(scope="session")
def frames_of():
    """Function: particles, positions, number of frames, seed -> frames ``(F, N, 3)`` nm with freely turning torsions."""
    return _frames


@pytest.fixture(scope="session")
def springs_of():
    """Function: particles and positions to a closed-form potential with its minimum there."""
    return Springs


@pytest.fixture(scope="session")
def generator_of(from_smiles, frames_of):
    """Function: SMILES and configuration to a fresh generator at 300 K, with networks that are no longer near zero."""

    def make(
        smiles: str, configuration: FlowConfiguration | None = None, dtype: torch.dtype = torch.float64
    ) -> BoltzmannGenerator:
        particles, positions = from_smiles(smiles)
        model = BoltzmannGenerator.untrained(particles, 300.0, frames_of(particles, positions, 800), configuration)
        stir(model.flow)
        model.flow.to(dtype)
        return model

    return make


def stir(flow: torch.nn.Module, seed: int = 3, size: float = 0.03) -> None:
    """Move every parameter away from its initial value, so that nothing is an identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


PAPER = {
    "circular": "all",
    "torsions": {"couplings": 4, "components": 8, "learn_steepness": True, "minimum_width": 0.1},
    "stiff": {"map": "interval", "transform": "bumps", "split": "angles_then_bonds", "couplings": 5},
}


@pytest.fixture(scope="session")
def paper_design() -> FlowConfiguration:
    """The design of arXiv 2110.00351."""
    return FlowConfiguration.model_validate(PAPER)
