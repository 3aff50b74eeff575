"""The molecules and flows that the benchmarks time: made here, without training, which changes no timing."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import app, unit

from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm.forces.particles import particles_from_topology

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


def alanine_system(topology: app.Topology | None = None) -> openmm.System:
    """Return the System of alanine dipeptide, or another peptide, in Amber ff96 with OBC implicit solvent."""
    return app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(topology or alanine_topology()[0])


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
    return simulated(alanine_system(), alanine_topology()[1], frames)


def alanine_flow(configuration: FlowConfiguration = FLOW, residues: int = 1) -> BoltzmannGenerator:
    """Return a flow of an alanine chain whose networks are no longer near the identity."""
    topology, _ = chain_topology(residues)
    frames = alanine_frames() if residues == 1 else alanine_chain(residues)[1]
    flow = BoltzmannGenerator.untrained(particles_from_topology(topology), 300.0, frames, configuration)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return flow.requires_grad_(False)


def chain_topology(residues: int) -> tuple[app.Topology, NDArray[np.float64]]:
    """Return topology and positions of ACE-(ALA)n-NME: the residue of the example's dipeptide repeated.

    The motion that takes the peptide plane before the residue to the one after it is applied again and again, which makes a
    chain with the same torsions everywhere.
    """
    source, positions = alanine_topology()
    atoms = list(source.atoms())
    place = {(atom.residue.name, atom.name): atom.index for atom in atoms}
    before = _frame(positions[[place["ACE", "C"], place["ALA", "N"], place["ALA", "CA"]]])
    behind = _frame(positions[[place["ALA", "C"], place["NME", "N"], place["NME", "C"]]])
    motion = behind @ np.linalg.inv(before)
    topology, chain_positions = app.Topology(), []
    chain = topology.addChain()
    copies = [("ACE", 0), *(("ALA", number) for number in range(residues)), ("NME", residues - 1)]
    for name, number in copies:
        residue = topology.addResidue(name, chain)
        step = np.linalg.matrix_power(motion, number)
        for atom in atoms:
            if atom.residue.name == name:
                topology.addAtom(atom.name, atom.element, residue)
                chain_positions.append(step[:3, :3] @ positions[atom.index] + step[:3, 3])
    topology.createStandardBonds()
    return topology, np.array(chain_positions)


def _frame(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rigid motion ``(4, 4)`` that takes the origin to the second of three points and the axes along them."""
    first = points[0] - points[1]
    first /= np.linalg.norm(first)
    third = np.cross(first, points[2] - points[1])
    third /= np.linalg.norm(third)
    motion = np.eye(4)
    motion[:3, :3] = np.stack([first, np.cross(third, first), third], axis=1)
    motion[:3, 3] = points[1]
    return motion


@cache
def alanine_chain(residues: int, frames: int = 1500) -> tuple[openmm.System, NDArray[np.float64]]:
    """Return the system of ACE-(ALA)n-NME in Amber ff96 with OBC implicit solvent, and frames ``(F, N, 3)`` nm."""
    topology, positions = chain_topology(residues)
    system = alanine_system(topology)
    return system, simulated(system, positions, frames, interval=10)


def multiply_adds(flow: BoltzmannGenerator) -> int:
    """Return the multiply-adds of all linear layers in one evaluation of the density."""
    return sum(layer.weight.numel() for layer in flow.modules() if isinstance(layer, torch.nn.Linear))
