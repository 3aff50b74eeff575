"""A flow of another library, trained here on samples of a pair of particles, drives OpenMM.

    python examples/zuko_in_openmm.py [TRAINING_STEPS]

Two particles in a harmonic trap prefer two distances. A neural spline flow of zuko learns their density from samples; as a
potential it gives the same distribution of distances when OpenMM's Langevin dynamics runs with it.
"""

import sys

import numpy as np
import torch
import zuko
from openmm import Context, CustomBondForce, CustomExternalForce, LangevinMiddleIntegrator, Platform, System, unit

from flowbridge.core.potential import Particles
from flowbridge.integrations.external_flows import DensityPotential
from flowbridge.integrations.openmm import add_potential, particle_system

TEMPERATURE = 300.0
PAIR = Particles(names=("Ar1", "Ar2"), atomic_numbers=(18, 18), masses=(39.948, 39.948))


def pair() -> System:
    """Return the known system: wells at distances of 0.3 and 0.7 nm."""
    system = particle_system(
        DensityPotential(torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6)), PAIR, 1.0)
    )
    trap = CustomExternalForce("60 * (x^2 + y^2 + z^2)")
    for index in range(2):
        trap.addParticle(index)
    bond = CustomBondForce("5000 * ((r - 0.5)^2 - 0.04)^2")
    bond.addBond(0, 1)
    system.addForce(trap)
    system.addForce(bond)
    return system


def sampled(system: System, start: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Return frames ``(F, 2, 3)`` nm of Langevin dynamics."""
    integrator = LangevinMiddleIntegrator(TEMPERATURE, 5.0, 0.005)
    integrator.setRandomNumberSeed(seed)
    context = Context(system, integrator, Platform.getPlatform("Reference"))
    context.setPositions(start)
    kept = []
    for _ in range(frames):
        integrator.step(20)
        kept.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return np.array(kept)


def main(steps: int = 600, frames: int = 10_000, check: int = 500) -> tuple[float, float]:
    """Train, run, print; return the mean distance in the data and in the dynamics of the flow, nm."""
    start = np.array([[0.2, 0.0, 0.0], [-0.2, 0.0, 0.0]])
    data = sampled(pair(), start, frames, seed=1)

    torch.manual_seed(1)
    scale = float(data.std())  # splines act on numbers of order one
    flow = zuko.flows.NSF(6, transforms=3, hidden_features=(64, 64), activation=torch.nn.SiLU)
    optimiser = torch.optim.Adam(flow.parameters(), lr=2e-3)
    x = torch.as_tensor(data.reshape(len(data), 6) / scale, dtype=torch.float32)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (256,))]
        optimiser.zero_grad()
        (-flow().log_prob(batch).mean()).backward()
        optimiser.step()

    size = torch.tensor(scale, dtype=torch.float64)
    potential = DensityPotential(
        flow.requires_grad_(False),
        PAIR,
        TEMPERATURE,
        coordinates=lambda positions: (positions.flatten(1) / size, -6 * size.log()),
    )
    system = particle_system(potential)
    add_potential(system, potential)
    driven = sampled(system, start, check, seed=2)

    means = [float(np.linalg.norm(part[:, 0] - part[:, 1], axis=1).mean()) for part in (data, driven)]
    print(f"mean distance: {means[0]:.3f} nm in the data, {means[1]:.3f} nm in dynamics with the flow")
    return means[0], means[1]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
