"""The ``flowbridge`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .molecules import build, isomers, teach
from .options import AsJSON, ConfigurationFile, Debug, Scheduler, Workers, readable_errors

application = typer.Typer(
    help="Train normalizing flows on molecules and use them in OpenMM, ASE and reweighting.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"flowbridge {version('flowbridge')}")
        raise typer.Exit


@application.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train normalizing flows on molecules and use them in OpenMM, ASE and reweighting."""


@application.command()
def run(
    config: ConfigurationFile,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: as in CONFIG.toml.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Simulate, train, drive MD, reweight and write a report.

    Finished stages are kept: after an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann import pipeline

        pipeline.run(config, output, workers, scheduler)


@application.command()
def train(
    topology: Annotated[Path, typer.Option(help="PDB or mmCIF file of the molecule, with all hydrogens.")],
    trajectory: Annotated[
        list[Path], typer.Option(help="DCD, XTC, HDF5, ASE trajectory ...; may be repeated.", show_default=False)
    ],
    system: Annotated[Path | None, typer.Option(help="The System, serialised by openmm.XmlSerializer.")] = None,
    force_field: Annotated[
        list[str] | None, typer.Option(help="Instead of a System: OpenMM force-field file; may be repeated.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the trajectory, K.  [default: 300]")] = None,
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
        typer.Option(min=0, help="Steps of dynamics from each frame; for trajectories with constraints, 500."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Weighted samples in each set.  [default: 100000]")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/NAME]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.  [default: 1]")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Train a Boltzmann generator on a trajectory, and print averages reweighted to the force field.

    Finished stages are kept: after an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann import from_trajectory

        workflow = from_trajectory.workflow_from(
            topology, trajectory, system, force_field or (),
            configuration=config, temperature=temperature, torsions=torsion or (), discard=discard, stride=stride,
            relaxation_steps=relaxation_steps, samples=samples, output=output, seed=seed, workers=workers,
        )  # fmt: skip
        from_trajectory.run(workflow, scheduler)


@application.command("coarse-grain")
def coarse_grain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to coarse-grain, and how.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default: as in CONFIG.toml.")] = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Coarse-grain a molecule: reference frames, beads, force field, its simulation, and how good it is.

    Finished stages are kept: after an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.coarse_graining import pipeline as workflow

        workflow.run(config, output, workers)


@application.command()
def reference(config: ConfigurationFile, workers: Workers = None, debug: Debug = False) -> None:
    """Compute the reference free energy of a workflow anew (long) and store it beside CONFIG.toml."""
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann import reference as reference_workflow

        reference_workflow.run(config, workers)


@application.command()
def md(
    model: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    structure: Annotated[Path, typer.Option(help="PDB or mmCIF file to start from.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole run; more than before extend it.")] = 100_000,
    output: Annotated[Path | None, typer.Option(help="Path without ending.  [default: the model's name]")] = None,
    temperature: Annotated[float | None, typer.Option(help="K.  [default: the model's]")] = None,
    step_fs: Annotated[float, typer.Option(help="Time step, fs.")] = 1.0,
    friction: Annotated[float, typer.Option(help="Of the Langevin thermostat, 1/ps.")] = 1.0,
    constant_energy: Annotated[bool, typer.Option("--constant-energy", help="No thermostat: velocity Verlet.")] = False,
    interval: Annotated[int, typer.Option(min=1, help="Steps between frames.")] = 100,
    hydrogen_mass: Annotated[float | None, typer.Option(help="Of every hydrogen, amu, for longer steps.")] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="Minimise the energy first.")] = False,
    seed: Annotated[int, typer.Option(help="Of velocities and noise.")] = 1,
    platform: Annotated[str | None, typer.Option(help="Of OpenMM.  [default: Reference]")] = None,
    debug: Debug = False,
) -> None:
    """Run molecular dynamics of a model: NAME.dcd, NAME.csv and a checkpoint.

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


@application.command()
def socket(
    model: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    structure: Annotated[Path, typer.Option(help="Structure with the atoms in the driver's order; any format of ASE.")],
    unix: Annotated[str | None, typer.Option(help="Name of the driver's UNIX socket.")] = None,
    host: Annotated[str, typer.Option(help="Where the driver runs.")] = "localhost",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Its port, instead of a UNIX socket.")] = None,
    debug: Debug = False,
) -> None:
    """Serve a model's energies and forces to i-PI, or another driver that speaks its protocol."""
    with readable_errors(debug):
        from ..integrations.socket import serve

        serve(model, structure, unix=unix, host=host, port=port)


@application.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model file.")],
    json: AsJSON = False,
    debug: Debug = False,
) -> None:
    """Show what a model file holds, after verifying it."""
    with readable_errors(debug):
        from ..core.model_files.files import read_header
        from ..workflows.information import information_as_json, print_information

        header = read_header(file)
        if json:
            typer.echo(information_as_json(header))
        else:
            print_information(header, file, Console())


@application.command()
def density(
    structure: Annotated[Path, typer.Argument(metavar="MOLECULE", help="XYZ file, or any other format of ASE.")],
    charge: Annotated[int | None, typer.Option(help="Total charge, e.  [default: of the file, or 0]")] = None,
    spin: Annotated[int | None, typer.Option(help="Unpaired electrons.  [default: as few as possible]")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/NAME]")] = None,
    orbitals: Annotated[str, typer.Option(help="natural (of CCSD) or hartree-fock.")] = "natural",
    basis: Annotated[str, typer.Option(help="Gaussian basis of the orbitals.")] = "aug-cc-pvtz",
    virtual: Annotated[int, typer.Option(min=0, help="Virtual orbitals that the optimiser may mix in.")] = 0,
    active_space: Annotated[
        tuple[int, int] | None, typer.Option(help="Electrons and orbitals of a CASSCF expansion.")
    ] = None,
    model: Annotated[str, typer.Option(help="Of the density: linear, neural.")] = "linear",
    iterations: Annotated[int, typer.Option(min=0, help="Of the optimiser.")] = 4,
    walkers: Annotated[int, typer.Option(min=32, help="Markov chains.")] = 1024,
    sweeps: Annotated[int, typer.Option(min=3, help="Recorded configurations of each.")] = 60,
    reference: Annotated[str, typer.Option(help="Compare with hf, ccsd or none.")] = "ccsd",
    spacing: Annotated[float, typer.Option(help="Of the cube file, Angstrom.")] = 0.15,
    force_field: Annotated[
        Path | None, typer.Option(help="OpenMM XML file to write, with charges fitted to the electrostatic potential.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Samples of another program instead of sampling here.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    debug: Debug = False,
) -> None:
    """Compute a molecule's electron density by quantum Monte Carlo: properties with errors, picture, cube, model file.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..core.errors import ConfigurationError
        from ..workflows.electron_density import DensityRequest, compute_and_print

        if reference not in ("hf", "ccsd", "none"):
            raise ConfigurationError(f"the reference must be hf, ccsd or none, got {reference!r}")
        parameters = {
            "charge": charge, "spin": spin, "orbitals": orbitals, "basis": basis, "virtual": virtual,
            "active_space": active_space, "model": model, "iterations": iterations, "walkers": walkers,
            "sweeps": sweeps, "samples": samples, "seed": seed,
        }  # fmt: skip
        compute_and_print(
            DensityRequest(
                structure, output or Path("runs") / structure.stem, parameters, spacing, reference, force_field
            )
        )


@application.command()
def deepqmc(
    training: Annotated[Path, typer.Argument(metavar="TRAINING", help="Training directory of a run of DeepQMC.")],
    output: Annotated[Path, typer.Argument(metavar="SAMPLES", help="File to write, for flowbridge density --samples.")],
    python: Annotated[Path, typer.Option(help="Interpreter of an environment with DeepQMC.")],
    checkpoint: Annotated[str, typer.Option(help="File name, such as chkpt-1000.pt; LAST for the last.")] = "LAST",
    walkers: Annotated[int, typer.Option(min=32, help="Markov chains.")] = 512,
    sweeps: Annotated[int, typer.Option(min=3, help="Recorded configurations of each.")] = 60,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    debug: Debug = False,
) -> None:
    """Draw samples from a wave function of DeepQMC, in DeepQMC's own environment.

    DeepQMC reads its checkpoint with pickle, which runs what the file says: give only checkpoints that you trust.
    """
    with readable_errors(debug):
        from ..integrations.deepqmc import export_samples

        options = {"checkpoint": checkpoint, "walkers": walkers, "sweeps": sweeps, "seed": seed}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        samples = export_samples(python, training, output, options=words)
        typer.echo(f"{output}: energy {samples.energy.value:.5f} +- {samples.energy.error:.5f} Hartree")


@application.command("compile")
def compile_model_file(
    file: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Configurations of one call; may be repeated.  [default: 1]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; default: as the model is.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Also what is compiled already, or failed before.")] = False,
    debug: Debug = False,
) -> None:
    """Compile a model for this machine ahead of time, and time it.

    OpenMM forces and ASE calculators do so by themselves when they first need it.
    """
    with readable_errors(debug):
        from ..workflows.compiling import compile_model, print_programs

        print_programs(compile_model(file, batch or [1], dtype, anew), Console())


@application.command()
def doctor(
    json: AsJSON = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out compiling with torch and importing each package.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Try which packages, platforms, backends and compilers work here, and say why others do not.

    The exit code is 0 when everything that flowbridge cannot do without works.
    """
    with readable_errors(debug):
        from ..workflows.diagnostics.doctor import core_works, examine, findings_as_json, print_findings

        stderr = Console(stderr=True)
        with stderr.status("trying") as status:
            findings = list(examine(quick=quick, announce=lambda what: status.update(f"trying {what}")))
        if json:
            typer.echo(findings_as_json(findings))
        else:
            print_findings(findings, Console())
        if not core_works(findings):
            raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(application())


for command in (build, teach, isomers):
    application.command()(command)
