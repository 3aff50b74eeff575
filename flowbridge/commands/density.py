"""The command ``flowbridge density``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Seed, Skip, Until, end, readable_errors, selection


def density(
    structure: Annotated[Path, typer.Argument(metavar="MOLECULE", help="XYZ file, or any other format of ASE.")],
    charge: Annotated[int | None, typer.Option(help="Total charge, e.  [default: as in the file, or 0]")] = None,
    spin: Annotated[
        int | None, typer.Option(help="Number of unpaired electrons.  [default: as few as possible]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/NAME]")] = None,
    orbitals: Annotated[str, typer.Option(help="Orbitals: natural (of CCSD) or hartree-fock.")] = "natural",
    basis: Annotated[str, typer.Option(help="Gaussian basis of the orbitals.")] = "aug-cc-pvtz",
    virtual: Annotated[int, typer.Option(min=0, help="Virtual orbitals that the optimiser may mix in.")] = 0,
    active_space: Annotated[
        tuple[int, int] | None, typer.Option(help="Electrons and orbitals of a CASSCF expansion.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the density: linear or neural.")] = "linear",
    iterations: Annotated[int, typer.Option(min=0, help="Iterations of the optimiser.")] = 4,
    walkers: Annotated[int, typer.Option(min=32, help="Markov chains.")] = 1024,
    sweeps: Annotated[int, typer.Option(min=3, help="Recorded configurations of each chain.")] = 60,
    reference: Annotated[str, typer.Option(help="Compare with hf, ccsd or none.")] = "ccsd",
    spacing: Annotated[float, typer.Option(help="Grid spacing of the cube file, Angstrom.")] = 0.15,
    force_field: Annotated[
        Path | None, typer.Option(help="OpenMM XML file to write, with charges fitted to the electrostatic potential.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Samples of another program instead of sampling here.")] = None,
    seed: Seed = 1,
    until: Until = None,
    skip: Skip = None,
    debug: Debug = False,
) -> None:
    """Compute an electron density by quantum Monte Carlo.

    Writes properties with errors, a picture, a cube file and a model file.

    After an interruption the same command continues. Stages: density, properties, charges.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.electron_density import DensityRequest, compute_density

        parameters = {
            "charge": charge, "spin": spin, "orbitals": orbitals, "basis": basis, "virtual": virtual,
            "active_space": active_space, "model": model, "iterations": iterations, "walkers": walkers,
            "sweeps": sweeps, "samples": samples, "seed": seed,
        }  # fmt: skip
        folder = output or Path("runs") / structure.stem
        request = DensityRequest(structure, folder, parameters, spacing, reference, force_field)
        end(compute_density(request, selection(until, skip)))
