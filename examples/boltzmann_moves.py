"""Boltzmann generator moves between stretches of ordinary dynamics, in an ordinary OpenMM script.

    python examples/boltzmann_moves.py runs/alanine_dipeptide/alanine_dipeptide.flow [STEPS]

The force field is Amber's; the flow adds nothing to the energy. It proposes conformations, and the
Metropolis-Hastings rule accepts or rejects them, so the Boltzmann distribution stays the same.
"""

import sys
from pathlib import Path

from openmm import LangevinMiddleIntegrator, Platform, app, unit

from flowbridge.integrations.openmm import BoltzmannMover


def main(model: str, steps: int = 50_000) -> None:
    """Run, and print how often conformations were exchanged."""
    pdb = app.PDBFile(str(Path(__file__).parent / "alanine_dipeptide.pdb"))
    system = app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(pdb.topology, constraints=None)
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond)
    simulation = app.Simulation(pdb.topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setPositions(pdb.positions)
    simulation.minimizeEnergy()
    simulation.reporters.append(app.StateDataReporter(sys.stdout, max(steps // 5, 1), step=True, potentialEnergy=True))

    mover = BoltzmannMover(simulation, model, interval=100, proposals=4, seed=1)
    mover.step(steps)
    found = mover.statistics
    print(f"{found.accepted} of {found.proposed} proposals accepted ({100 * found.acceptance:.0f} %)")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"usage: python {sys.argv[0]} MODEL.flow [STEPS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
