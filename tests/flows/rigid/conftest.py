"""Small systems of rigid bodies: tethered tetrahedra, whose free energies are integrals over one angle."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.flows.rigid.bodies import BodyConfiguration, RigidBodies
from flowbridge.flows.rigid.crystal import Crystal
from flowbridge.flows.rigid.maps.quaternions import random_orientations

EDGE = 0.1  # nm from the centre to a corner
CORNERS = EDGE / math.sqrt(3) * torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)


@dataclass
class Tethers:
    """Every corner of every body is tied to its place by a spring; a BatchedEnergy."""

    places: np.ndarray
    spring: float

    def energies_and_forces(self, positions):
        stretch = positions - self.places
        return 0.5 * self.spring * (stretch**2).sum((1, 2)), -self.spring * stretch


@dataclass
class TetheredBodies:
    """M tetrahedra about their sites.

    With corners at b, ``U = spring (4/2 |d|^2 + 4 |b|^2 (1 - tr R / 3))`` for a displacement d and a rotation R.
    """

    bodies: RigidBodies
    crystal: Crystal
    energy: Tethers
    particles: Particles

    def free_energy(self, temperature: float) -> float:
        """Return ``-log`` of the configuration integral of orientations and relative positions, by quadrature."""
        beta = 1.0 / thermal_energy(temperature)
        angle = np.linspace(0.0, math.pi, 20_001)
        potential = self.energy.spring * 4 * EDGE**2 * (1 - (1 + 2 * np.cos(angle)) / 3)
        orientations = np.trapezoid((1 - np.cos(angle)) / math.pi * np.exp(-beta * potential), angle)
        positions = (2 * math.pi / (4 * beta * self.energy.spring)) ** 1.5
        return -self.bodies.count * math.log(orientations) - (self.bodies.count - 1) * math.log(positions)


def tethered(count: int, spring: float = 3e4, box: float | None = None) -> TetheredBodies:
    generator = torch.Generator().manual_seed(7)
    bodies = RigidBodies(CORNERS, count)
    sites = 0.4 * torch.arange(count, dtype=torch.float64)[:, None] * torch.ones(3, dtype=torch.float64)
    orientations = random_orientations((count,), generator)
    crystal = Crystal(sites, orientations, None if box is None else torch.full((3,), box, dtype=torch.float64))
    places = bodies.places(BodyConfiguration(sites.unsqueeze(0), orientations.unsqueeze(0)))[0].numpy()
    names = tuple(f"A{index}" for index in range(4 * count))
    particles = Particles(names, (0,) * (4 * count), (1.0,) * (4 * count))
    return TetheredBodies(bodies, crystal, Tethers(places, spring), particles)


@pytest.fixture
def one_body():
    return tethered(1)


@pytest.fixture
def three_bodies():
    return tethered(3, box=2.0)
