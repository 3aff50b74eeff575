"""A trained flow as an ASE calculator: relax the molecule, then run dynamics and average a torsion.

python examples/ase_script.py runs/alanine_dipeptide/alanine_dipeptide.flow [STEPS]
"""

import sys
from pathlib import Path

import ase.io
import numpy as np
from ase import units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS

from flowbridge.calculators import PotentialCalculator

PSI = (6, 8, 14, 16)


def main(model: str, steps: int = 2000) -> None:
    """Relax, run Langevin dynamics at 300 K, and print what became of the torsion psi."""
    atoms = ase.io.read(Path(__file__).parent / "alanine_dipeptide.pdb")
    atoms.calc = PotentialCalculator(model)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    print(f"relaxed: {atoms.get_potential_energy():.3f} eV, psi {atoms.get_dihedral(*PSI):.0f} degrees")

    random = np.random.default_rng(1)
    thermalize_momenta(atoms, 300.0, rng=random)
    dynamics = Langevin(atoms, 1.0 * units.fs, temperature_K=300, friction=0.01 / units.fs, rng=random)
    psi = []
    dynamics.attach(lambda: psi.append(np.radians(atoms.get_dihedral(*PSI))), interval=10)
    dynamics.run(steps)
    mean = np.degrees(np.angle(np.mean(np.exp(1j * np.array(psi)))))
    print(f"dynamics: {steps} steps, mean psi {mean:.0f} degrees, {atoms.get_temperature():.0f} K at the end")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"usage: python {sys.argv[0]} MODEL.flow [STEPS]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
