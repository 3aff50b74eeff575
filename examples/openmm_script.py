"""A trained flow as the only force of an ordinary OpenMM script.

    python examples/openmm_script.py runs/alanine_dipeptide/alanine_dipeptide.flow [STEPS]

The same in one command: flowbridge md MODEL.flow --structure examples/alanine_dipeptide.pdb
"""

import sys
from pathlib import Path

from openmm import LangevinMiddleIntegrator, Platform, app, unit

from flowbridge.integrations.openmm import add_potential, particle_system


def main(model: str, steps: int = 20_000) -> None:
    """Run Langevin dynamics, and print energies and temperature on the way."""
    pdb = app.PDBFile(str(Path(__file__).parent / "alanine_dipeptide.pdb"))
    system = particle_system(model)  # masses only: the flow takes the place of the force field
    add_potential(system, model, topology=pdb.topology)

    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    simulation = app.Simulation(pdb.topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setPositions(pdb.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters.append(
        app.StateDataReporter(
            sys.stdout, max(steps // 5, 1), step=True, potentialEnergy=True, temperature=True, speed=True
        )
    )
    simulation.step(steps)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"usage: python {sys.argv[0]} MODEL.flow [STEPS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
