"""The command ``flowbridge deepqmc``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Seed, readable_errors


def deepqmc(
    training: Annotated[Path, typer.Argument(metavar="TRAINING", help="Training directory of a run of DeepQMC.")],
    output: Annotated[Path, typer.Argument(metavar="SAMPLES", help="File to write, for flowbridge density --samples.")],
    python: Annotated[Path, typer.Option(help="Interpreter of an environment with DeepQMC.")],
    checkpoint: Annotated[str, typer.Option(help="File name, such as chkpt-1000.pt; LAST for the last.")] = "LAST",
    walkers: Annotated[int, typer.Option(min=32, help="Markov chains.")] = 512,
    sweeps: Annotated[int, typer.Option(min=3, help="Recorded configurations of each chain.")] = 60,
    seed: Seed = 1,
    debug: Debug = False,
) -> None:
    """Draw samples from a wave function of DeepQMC.

    DeepQMC runs in an environment of its own.

    DeepQMC reads its checkpoint with pickle, which runs what the file says: give only checkpoints that you trust.
    """
    with readable_errors(debug):
        from ..integrations.deepqmc import export_samples

        options = {"checkpoint": checkpoint, "walkers": walkers, "sweeps": sweeps, "seed": seed}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        samples = export_samples(python, training, output, options=words)
        typer.echo(f"{output}: energy {samples.energy.value:.5f} +- {samples.energy.error:.5f} Hartree")
