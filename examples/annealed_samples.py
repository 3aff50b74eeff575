"""Annealed importance sampling from a Boltzmann generator to a force field, by short Langevin dynamics in OpenMM.

    python examples/annealed_samples.py MODEL.flow [SAMPLES]

The forces turn from the flow's into the force field's in ten rungs of ten steps. The effective sample size grows, and averages
are those of the force field at any time step.
"""

import sys
from pathlib import Path

from openmm.app import ForceField, PDBFile

import flowbridge as fb
from flowbridge.integrations.openmm import annealed_samples


def main(model: str, count: int = 1000, rungs: int = 10, steps: int = 10) -> tuple[float, float]:
    """Draw, anneal, print; return the effective sample sizes in percent."""
    pdb = PDBFile(str(Path(__file__).parent / "alanine_dipeptide.pdb"))
    system = ForceField("amber96.xml", "amber96_obc.xml").createSystem(pdb.topology, constraints=None)
    plain = fb.load(model).sample(count, target=system, seed=1)
    annealed = annealed_samples(
        model, system, count, fractions=rungs, steps=steps, step_ps=0.0005, friction=20.0, seed=1
    )
    percents = plain.effective_sample_percent(), annealed.effective_sample_percent()
    print(
        f"effective sample size of {count} samples: {percents[0]:.1f} % of the flow, {percents[1]:.1f} % after annealing"
    )
    return percents


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
