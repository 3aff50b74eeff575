"""A tetrahedral body in a field that orients it: four modes on the group of rotations, whose weights quadrature knows.

A body like methane, with the charges of OPLS-AA. As a rigid body it has neither a dipole nor a quadrupole, so that a
uniform field does not turn it; the published system bends its angles. Here it stays rigid, in a field that grows with
the square of the height, which takes hold of its octupole: each of the four hydrogens wants to point down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

from flowbridge.core.potential import Particles
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.units import thermal_energy
from flowbridge.flows.rigid.bodies import BodyConfiguration, RigidBodies
from flowbridge.flows.rigid.configuration import RigidFlowConfiguration, RigidFlowTraining
from flowbridge.flows.rigid.crystal import CrystalCoordinates
from flowbridge.flows.rigid.generator import RigidBodyGenerator
from flowbridge.flows.rigid.maps.quaternions import random_orientations
from flowbridge.flows.rigid.training import train_by_likelihood
from flowbridge.integrations.openmm import OpenMMEnergy

TEMPERATURE = 100.0
DESIGN = RigidFlowConfiguration(
    orientations="convex_gradient", components=16, repetitions=6, first_exponent=0.7, least_exponent=0.5, seed=1
)
BOND = 0.109  # nm
CORNERS = BOND / math.sqrt(3) * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=np.float64)
SITES = np.concatenate([np.zeros((1, 3)), CORNERS])
PARTICLES = Particles(
    ("C", "H1", "H2", "H3", "H4"), (6, 1, 1, 1, 1), (12.011, *(1.008,) * 4), tuple((0, i) for i in range(1, 5))
)


@dataclass(frozen=True)
class Body:
    """The body and its field.

    Attributes:
        name: name of the case.
        charges: charges of C and the four H, elementary charges.
        strength: the potential of the field is ``strength y^3``, kJ/(mol e nm^3).
    """

    name: str
    charges: tuple[float, ...]
    strength: float = 1e5

    def system(self) -> openmm.System:
        """Return the System of the five sites."""
        system = openmm.System()
        field = openmm.CustomExternalForce("strength * q * y^3")
        field.addGlobalParameter("strength", self.strength)
        field.addPerParticleParameter("q")
        for index, (mass, charge) in enumerate(zip(PARTICLES.masses, self.charges, strict=True)):
            system.addParticle(mass)
            field.addParticle(index, [charge])
        system.addForce(field)
        return system

    def exact(self, points: int = 400) -> tuple[NDArray[np.float64], float]:
        """Return the weights ``(4,)`` of the modes and the free energy in kT, by quadrature.

        The energy depends on where the vertical is in the frame of the body: Gauss and Legendre's rule times the
        trapezoidal one.
        """
        heights, weights = np.polynomial.legendre.leggauss(points)
        azimuths = np.arange(2 * points) * math.pi / points
        radius = np.sqrt(1 - heights[:, None] ** 2)
        vertical = np.stack(
            [
                radius * np.cos(azimuths),
                radius * np.sin(azimuths),
                np.broadcast_to(heights[:, None], (points, 2 * points)),
            ],
            -1,
        )
        y = vertical @ SITES.T
        energy = self.strength * (np.array(self.charges) * y**3).sum(-1)
        shares = weights[:, None] / (4 * points) * np.exp(-energy / thermal_energy(TEMPERATURE))
        mode = y[..., 1:].argmin(-1)
        return np.array([shares[mode == m].sum() for m in range(4)]) / shares.sum(), -math.log(shares.sum())


BODIES = {
    "tetrahedron": Body("four equal hydrogens", (-0.24, 0.06, 0.06, 0.06, 0.06)),
    "uneven-tetrahedron": Body("one hydrogen with a tenth more charge", (-0.246, 0.06, 0.06, 0.06, 0.066)),
}


def independent_orientations(body: Body, energy: OpenMMEnergy, count: int, seed: int) -> torch.Tensor:
    """Return ``(count, 1, 4)`` orientations of the body in its field, by rejection of uniform ones."""
    bodies = RigidBodies(torch.from_numpy(SITES), 1)
    generator = torch.Generator().manual_seed(seed)
    # The corners cannot lower the energy by more than this.
    bound = abs(body.strength) * BOND**3 * max(body.charges[1:]) / thermal_energy(TEMPERATURE)
    kept: list[torch.Tensor] = []
    while sum(map(len, kept)) < count:
        drawn = random_orientations((50_000, 1), generator)
        places = bodies.places(BodyConfiguration(torch.zeros(len(drawn), 1, 3, dtype=torch.float64), drawn))
        reduced = torch.from_numpy(energy.energies_and_forces(places.numpy())[0]) / thermal_energy(TEMPERATURE)
        kept.append(drawn[torch.rand(len(drawn), generator=generator) < torch.exp(-bound - reduced)])
    return torch.cat(kept)[:count]


def trained(body: Body, settings: RigidFlowTraining, frames: int, folder: Path, seed: int) -> RigidBodyGenerator:
    """Return a generator that learned from independent orientations."""
    orientations = independent_orientations(body, OpenMMEnergy(body.system(), "Reference", 1), frames, seed)
    data = CrystalCoordinates(torch.zeros(frames, 1, 3, dtype=torch.float64), orientations)
    bodies = RigidBodies(torch.from_numpy(SITES), 1)
    model = RigidBodyGenerator.of_one_body(PARTICLES, TEMPERATURE, bodies, torch.zeros(3), DESIGN)
    train_by_likelihood(model.flow, model.base, data, settings, folder, seed)
    return model


def evaluated(body: Body, samples: WeightedSamples) -> dict[str, Any]:
    """Return effective sample size, weights of the modes and free energy, next to the exact ones."""
    modes = samples.positions[:, 1:, 1].argmin(1)
    weights = samples.average(np.eye(4)[modes])
    exact, free_energy = body.exact()
    log_weights = samples.log_weights
    return {
        "effective_percent": samples.effective_sample_percent(),
        "modes": np.asarray(weights.value).tolist(),
        "mode_errors": np.asarray(weights.error).tolist(),
        "modes_exact": exact.tolist(),
        "free_energy": float(math.log(len(log_weights)) - np.logaddexp.reduce(log_weights)),
        "free_energy_exact": free_energy,
    }
