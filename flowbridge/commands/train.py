"""The command ``flowbridge train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Scheduler, Skip, Until, Workers, end, readable_errors, selection


def train(
    topology: Annotated[Path, typer.Option(help="PDB or mmCIF file of the molecule, with all hydrogens.")],
    trajectory: Annotated[
        list[Path], typer.Option(help="DCD, XTC, HDF5, ASE trajectory ...; may be repeated.", show_default=False)
    ],
    system: Annotated[Path | None, typer.Option(help="The System, serialised by openmm.XmlSerializer.")] = None,
    force_field: Annotated[
        list[str] | None, typer.Option(help="Instead of a System: OpenMM force-field file; may be repeated.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the trajectory, K.  [default: 300]")] = None,
    torsion: Annotated[
        list[str] | None,
        typer.Option(help="NAME=A,B,C,D to report, atoms as indices or RESIDUE:NAME.  [default: all soft ones]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with further tables: [model], [reweight] ...")] = None,
    discard: Annotated[
        int | None, typer.Option(min=0, help="Frames to leave out at the beginning of each file.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Keep every so many frames.")] = None,
    relaxation_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of dynamics from each frame; 500 for trajectories with constraints."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Weighted samples in each set.  [default: 100000]")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/NAME]")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.  [default: 1]")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    until: Until = None,
    skip: Skip = None,
    debug: Debug = False,
) -> None:
    """Train a flow on a trajectory, and print reweighted averages.

    Finished stages are kept: after an interruption the same command continues. Stages: trajectory, train, reweight,
    averages.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann.from_trajectory import train_from_trajectory, workflow_from

        workflow = workflow_from(
            topology, trajectory, system, force_field or (),
            configuration=config, temperature=temperature, torsions=torsion or (), discard=discard, stride=stride,
            relaxation_steps=relaxation_steps, samples=samples, output=output, seed=seed, workers=workers,
        )  # fmt: skip
        end(train_from_trajectory(workflow, scheduler, selection(until, skip)))
