"""A solute from a model file in explicit water from a force field, through OpenMM-ML.

    python examples/mixed_system.py MODEL.flow [STEPS]

The model gives the energy within alanine dipeptide; everything else, its interactions with water among it, is Amber's. A flow
trained in implicit solvent has its solvation in it already, so the mixture shows the mechanics rather than the physics.
"""

import sys
from pathlib import Path

from openmm import LangevinMiddleIntegrator, Platform, Vec3, app, unit
from openmmml import MLPotential


def main(model: str, steps: int = 2000, box: float = 2.6) -> None:
    """Build the mixed System, run it, and print energies on the way; ``box`` in nm."""
    pdb = app.PDBFile(str(Path(__file__).parent / "alanine_dipeptide.pdb"))
    force_field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(force_field, boxSize=Vec3(box, box, box) * unit.nanometer)
    amber = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=None
    )

    solute = range(pdb.topology.getNumAtoms())
    system = MLPotential("flowbridge", modelPath=model).createMixedSystem(modeller.topology, amber, solute)

    # The solute's bonds vibrate freely, so the step is short; water stays rigid.
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    simulation = app.Simulation(modeller.topology, system, integrator, Platform.getPlatform("CPU"))
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters.append(
        app.StateDataReporter(sys.stdout, max(steps // 5, 1), step=True, potentialEnergy=True, temperature=True)
    )
    simulation.step(steps)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"usage: python {sys.argv[0]} MODEL.flow [STEPS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
