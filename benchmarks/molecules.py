"""The molecules and flows that the benchmarks time: made here, without training, which changes no timing."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import openmm
import torch
from flowbridge.flows.boltzmann_generator import BoltzmannGenerator
from flowbridge.flows.configuration import FlowConfiguration
from flowbridge.integrations.openmm.particles import particles_from_topology
from numpy.typing import NDArray
from openmm import app, unit

EXAMPLES = Path(__file__).parent.parent / "examples"

FLOW = FlowConfiguration.model_validate(
    {
        "circular": "soft",
        "torsions": {"couplings": 4, "components": 8, "hidden": [64, 64]},
        "stiff": {"map": "whitened", "transform": "sinh_arcsinh", "couplings": 8, "hidden": [64, 64]},
    }
)
"""About 180 000 multiply-adds for alanine dipeptide, as the flows of reference timings."""


def demo_flow() -> FlowConfiguration:
    """Return the flow of ``examples/alanine_dipeptide.toml``."""
    content = tomllib.loads((EXAMPLES / "alanine_dipeptide.toml").read_text())
    return FlowConfiguration.model_validate(content["model"]["flow"])


def alanine_topology() -> tuple[app.Topology, NDArray[np.float64]]:
    """Return topology and positions ``(22, 3)`` nm of the example's alanine dipeptide."""
    pdb = app.PDBFile(str(EXAMPLES / "alanine_dipeptide.pdb"))
    return pdb.topology, np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer))


def simulated(
    system: openmm.System, positions: NDArray[np.float64], frames: int, interval: int = 20, platform: str = "Reference"
) -> NDArray[np.float64]:
    """Return frames ``(F, N, 3)`` nm of Langevin dynamics at 300 K and 1 fs, after minimisation."""
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(300.0, 1)
    kept = []
    for _ in range(frames):
        integrator.step(interval)
        kept.append(context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return np.array(kept)


@cache
def alanine_frames(frames: int = 1000) -> NDArray[np.float64]:
    """Return frames ``(F, 22, 3)`` nm of alanine dipeptide in Amber ff96 with OBC implicit solvent."""
    topology, positions = alanine_topology()
    system = app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(topology)
    return simulated(system, positions, frames)


def alanine_flow(configuration: FlowConfiguration = FLOW) -> BoltzmannGenerator:
    """Return a flow of alanine dipeptide whose networks are no longer near the identity."""
    topology, _ = alanine_topology()
    flow = BoltzmannGenerator.untrained(particles_from_topology(topology), 300.0, alanine_frames(), configuration)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return flow.requires_grad_(False)


def multiply_adds(flow: BoltzmannGenerator) -> int:
    """Return the multiply-adds of all linear layers in one evaluation of the density."""
    return sum(layer.weight.numel() for layer in flow.modules() if isinstance(layer, torch.nn.Linear))
