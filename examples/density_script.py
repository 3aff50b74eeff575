"""The electron density of a molecule by quantum Monte Carlo, in ASE: energy, dipole and charges with error bars, a cube file.

python examples/density_script.py [MOLECULE [WALKERS]]

MOLECULE is a name that ase.build.molecule knows, LiH by default; a few minutes.
"""

import sys
from pathlib import Path

from ase.build import molecule
from ase.units import Bohr, Hartree

from flowbridge.calculators import QMCCalculator
from flowbridge.calculators.qmc.density.densities import GaussianDensity
from flowbridge.calculators.qmc.electronic_structure import reference_density
from flowbridge.calculators.qmc.figures import draw_density


def main(name: str = "LiH", walkers: int = 1024, folder: str | None = None, **parameters: object) -> None:
    """Compute, print what there is, and write NAME.cube and NAME.png into ``folder``."""
    output = Path(folder or f"runs/density_{name}")
    atoms = molecule(name)
    atoms.center(vacuum=3.0)
    atoms.calc = calculator = QMCCalculator(directory=output, walkers=walkers, seed=1, **parameters)

    energy = atoms.get_potential_energy()
    print(f"energy      {energy / Hartree:.4f} +- {calculator.errors['energy'] / Hartree:.4f} Hartree")
    for axis, moment, error in zip(
        "xyz", atoms.get_dipole_moment() / Bohr, calculator.errors["dipole"] / Bohr, strict=True
    ):
        print(f"dipole {axis}    {moment:7.4f} +- {error:.4f} e bohr")
    for index, (charge, error) in enumerate(zip(atoms.get_charges(), calculator.errors["charges"], strict=True)):
        print(f"charge {atoms.symbols[index]}{index}   {charge:7.4f} +- {error:.4f} e (Hirshfeld)")
    contact = calculator.properties.contact_densities()
    print("density at the nuclei", *(f"{v:.3f} +- {e:.3f}" for v, e in zip(*contact, strict=True)), "e/bohr^3")

    calculator.write_cube(output / f"{name}.cube")
    reference = GaussianDensity.from_reference(
        calculator.run.molecule, reference_density(calculator.run.molecule, "hf")
    )
    draw_density(
        output / f"{name}.png", calculator.properties, reference, f"{name}: quantum Monte Carlo", "Hartree-Fock"
    )
    print(f"written to {output}")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        raise SystemExit(f"usage: python {sys.argv[0]} [MOLECULE [WALKERS]]")
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
