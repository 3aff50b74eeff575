"""Potentials in closed form that stand in for learned ones: exact, fast, storable."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import networkx as nx
import numpy as np
import pytest
import torch
from openmm import app, unit
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.model_files.files import register_kind, save
from flowbridge.core.potential import Particles, Potential, PotentialMetadata
from flowbridge.integrations.openmm.forces.particles import particles_from_topology

# Compiling each of the many small potentials here would take hours; the tests of compiled code ask for it by name.
os.environ["FLOWBRIDGE_COMPILE"] = "never"
# What tests keep there is not the user's. The workers of pytest-xdist share it: each would compile the same programs.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")
os.environ["FLOWBRIDGE_CACHE"] = (
    str(Path(tempfile.gettempdir()) / f"flowbridge-tests-{_RUN}")
    if _RUN
    else tempfile.mkdtemp(prefix="flowbridge-tests-")
)

EXAMPLES = Path(__file__).parent.parent / "examples"


@register_kind
class MorseMolecule(Potential):
    """Morse bonds; springs to second and third neighbours, scaled by the parameter ``stiffness``."""

    kind = "test_morse_molecule"

    def __init__(self, particles: Particles, bonds, springs):
        super().__init__()
        self.metadata = PotentialMetadata(particles, temperature=300.0, global_parameters={"stiffness": 1.0})
        self.register_buffer("bonds", torch.as_tensor(bonds))
        self.register_buffer("springs", torch.as_tensor(springs))
        self.bond_lengths = torch.nn.Parameter(torch.zeros(len(bonds), dtype=torch.float64))
        self.spring_lengths = torch.nn.Parameter(torch.zeros(len(springs), dtype=torch.float64))
        self.spring_constants = torch.nn.Parameter(torch.zeros(len(springs), dtype=torch.float64))

    @classmethod
    def at_rest(cls, particles: Particles, positions: np.ndarray) -> "MorseMolecule":
        """Return the molecule whose energy is zero, and lowest, at ``positions``."""
        paths = dict(nx.all_pairs_shortest_path_length(nx.Graph(particles.bonds)))
        n = len(particles)
        near = [(i, j, paths[i][j]) for i in range(n) for j in range(i + 1, n) if 1 < paths[i][j] <= 3]
        potential = cls(particles, particles.bonds, [(i, j) for i, j, _ in near])
        x = torch.as_tensor(positions, dtype=torch.float64)[None]
        with torch.no_grad():
            potential.bond_lengths.copy_(_distances(x, potential.bonds)[0])
            potential.spring_lengths.copy_(_distances(x, potential.springs)[0])
            potential.spring_constants.copy_(torch.tensor([3.0e4 if d == 2 else 2.0e3 for *_, d in near]))
        return potential

    def forward(self, positions, cell=None, stiffness: float = 1.0):
        stretch = _distances(positions, self.bonds) - self.bond_lengths
        bend = _distances(positions, self.springs) - self.spring_lengths
        morse = 400.0 * (1.0 - torch.exp(-20.0 * stretch)) ** 2
        springs = 0.5 * stiffness * self.spring_constants * bend**2
        return (morse.sum(-1) + springs.sum(-1)).double()

    def configuration(self):
        return {
            "particles": self.metadata.particles.to_dict(),
            "bonds": self.bonds.tolist(),
            "springs": self.springs.tolist(),
        }

    @classmethod
    def from_configuration(cls, configuration):
        particles = Particles.from_dict(configuration["particles"])
        return cls(particles, configuration["bonds"], configuration["springs"])


@register_kind
class PeriodicFluid(Potential):
    """Gaussian repulsion between nearest images, short enough that farther images add nothing."""

    kind = "test_periodic_fluid"

    def __init__(self, count: int):
        super().__init__()
        particles = Particles(("Ar",) * count, (18,) * count, (39.948,) * count)
        self.metadata = PotentialMetadata(particles, periodic=True)
        self.width = torch.nn.Parameter(torch.tensor(0.12, dtype=torch.float64))

    def forward(self, positions, cell=None):
        i, j = torch.triu_indices(len(self.metadata.particles), len(self.metadata.particles), 1)
        fractional = (positions[:, i] - positions[:, j]) @ torch.linalg.inv(cell)
        separation = (fractional - torch.round(fractional)) @ cell
        return (50.0 * torch.exp(-(separation**2).sum(-1) / (2.0 * self.width**2))).sum(-1).double()

    def configuration(self):
        return {"count": len(self.metadata.particles)}

    @classmethod
    def from_configuration(cls, configuration):
        return cls(configuration["count"])


def _distances(positions, pairs):
    return torch.linalg.vector_norm(positions[:, pairs[:, 0]] - positions[:, pairs[:, 1]], dim=-1)


@dataclass(frozen=True)
class Molecule:
    """A molecule of the examples: topology, particles, and positions ``(N, 3)`` in nm."""

    topology: app.Topology
    particles: Particles
    positions: np.ndarray

    def shaken(self, count: int, amplitude: float = 0.005, seed: int = 0) -> np.ndarray:
        """Return ``(count, N, 3)`` random displacements of the positions; amplitude in nm."""
        random = np.random.default_rng(seed)
        return self.positions + amplitude * random.standard_normal((count, *self.positions.shape))


@pytest.fixture(scope="session")
def alanine() -> Molecule:
    """ACE-ALA-NME of the examples."""
    pdb = app.PDBFile(str(EXAMPLES / "alanine_dipeptide.pdb"))
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return Molecule(pdb.topology, particles_from_topology(pdb.topology), np.array(positions))


@pytest.fixture
def morse(alanine) -> MorseMolecule:
    """A closed-form potential of ACE-ALA-NME with its minimum at the positions of ``alanine``; in no file."""
    return MorseMolecule.at_rest(alanine.particles, alanine.positions)


@pytest.fixture
def morse_file(alanine, tmp_path) -> Path:
    """A model file of the potential ``morse``."""
    path = tmp_path / "morse.flow"
    save(MorseMolecule.at_rest(alanine.particles, alanine.positions), path)
    return path


@pytest.fixture(scope="session")
def shared_morse_file(alanine, tmp_path_factory) -> Path:
    """A model file of the potential ``morse`` that all tests share, in all processes; nobody may change it.

    What one process compiles of it, the others find, if they keep their cache next to it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "morse"
    folder.mkdir(exist_ok=True)
    path = folder / "morse.flow"
    with filelock.FileLock(folder / "morse.lock"):
        if not path.exists():
            save(MorseMolecule.at_rest(alanine.particles, alanine.positions), path)
    return path


@pytest.fixture(scope="session")
def compiled_morse_file(shared_morse_file) -> tuple[Path, str, str]:
    """``shared_morse_file`` with its program for one configuration in the cache next to it, and what the command printed.

    One process makes it with ``flowbridge compile``, the others wait.
    """
    printed = shared_morse_file.with_name("compiled.json")
    with filelock.FileLock(shared_morse_file.with_name("compiled.lock")), pytest.MonkeyPatch.context() as patch:
        if not printed.exists():
            patch.setenv("FLOWBRIDGE_CACHE", str(shared_morse_file.parent))
            done = CliRunner().invoke(application, ["compile", str(shared_morse_file), "--batch", "1"])
            assert done.exit_code == 0, done.output
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    return (shared_morse_file, *json.loads(printed.read_text()))


@pytest.fixture
def fluid() -> PeriodicFluid:
    """A closed-form periodic potential of 12 argon atoms; in no file."""
    return PeriodicFluid(12)
