"""The command ``flowbridge md``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Seed, readable_errors


def md(
    model: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    structure: Annotated[Path, typer.Option(help="PDB or mmCIF file to start from.")],
    steps: Annotated[
        int, typer.Option(min=1, help="Number of steps of the whole run; a larger one extends a finished run.")
    ] = 100_000,
    output: Annotated[Path | None, typer.Option(help="Path without ending.  [default: the model's name]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature, K.  [default: the model's]")] = None,
    step_fs: Annotated[float, typer.Option(help="Time step, fs.")] = 1.0,
    friction: Annotated[float, typer.Option(help="Friction of the Langevin thermostat, 1/ps.")] = 1.0,
    constant_energy: Annotated[bool, typer.Option("--constant-energy", help="No thermostat: velocity Verlet.")] = False,
    interval: Annotated[int, typer.Option(min=1, help="Steps between frames.")] = 100,
    hydrogen_mass: Annotated[float | None, typer.Option(help="Mass of every hydrogen, amu, for longer steps.")] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="Minimise the energy first.")] = False,
    seed: Seed = 1,
    platform: Annotated[str | None, typer.Option(help="OpenMM platform.  [default: Reference]")] = None,
    debug: Debug = False,
) -> None:
    """Run molecular dynamics of a model.

    Writes NAME.dcd, NAME.csv and a checkpoint.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..integrations.openmm.sampling.model_dynamics import ModelDynamics
        from ..workflows.model_dynamics import run_and_print

        run_and_print(
            ModelDynamics(
                model, structure, output or Path(model.stem), steps, temperature, step_fs,
                None if constant_energy else friction, interval, hydrogen_mass, minimise, seed, platform,
            )
        )  # fmt: skip
