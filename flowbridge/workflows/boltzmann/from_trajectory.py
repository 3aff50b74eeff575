"""``flowbridge train``: from a trajectory and a force field to a trained generator and reweighted averages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ...core.errors import ConfigurationError
from ...core.samples import WeightedSamples
from ...core.statistics.estimates import largest_weight_ratio
from ...core.training.processes import is_main_process
from ...integrations.openmm.sampling.torsion_bias import torsion_angles
from ..machines import machines_for
from ..stages import write_json
from . import reweight, train
from .averages import Average, averages, rotatable_torsions
from .configuration import Workflow, read_tables
from .dynamics import load_generator
from .molecular_system import molecular_system
from .pipeline import say, training_data
from .simulate import load_frames

if TYPE_CHECKING:
    from distributed import Client

_HEAVY = 50.0  # times the mean weight; a good generator's heaviest of 100,000 samples has ten times or less


def workflow_from(
    topology: Path,
    trajectories: Sequence[Path],
    system: Path | None,
    force_field: Sequence[str],
    *,
    configuration: Path | None = None,
    temperature: float | None = None,
    torsions: Sequence[str] = (),
    discard: int | None = None,
    stride: int | None = None,
    relaxation_steps: int | None = None,
    samples: int | None = None,
    output: Path | None = None,
    seed: int | None = None,
    workers: int | None = None,
) -> Workflow:
    """Return the workflow that the options of ``flowbridge train`` describe.

    Args:
        topology: PDB or mmCIF file.
        trajectories: of the same atoms in the same order.
        system: serialised System; or None, with a force field.
        force_field: OpenMM force-field files, with a System of None.
        configuration: TOML with further tables of a workflow: ``[model]``, ``[reweight]`` ...
        temperature: K; this and the options below take the place of what the configuration says, None keeps it.
        torsions: ``NAME=A,B,C,D``, each atom an index or RESIDUE:NAME.
        discard: frames at the beginning of each file.
        stride: keep every so many frames.
        relaxation_steps: see :class:`~flowbridge.workflows.boltzmann.configuration.TrajectoryFiles`.
        samples: number of weighted samples in each of the sets.
        output: folder for the results.
        seed: of everything random.
        workers: number of processes.

    Raises:
        ConfigurationError: for options that contradict each other or the configuration.
    """
    tables: dict[str, Any] = read_tables(configuration) if configuration is not None else {}
    molecule: dict[str, Any] = {
        "name": topology.stem,
        **tables.get("molecule", {}),
        "structure": str(topology.absolute()),
    }
    if system is not None:
        molecule["system"] = str(system.absolute())
    if force_field:
        molecule["force_field"] = [str(Path(name).absolute()) if Path(name).is_file() else name for name in force_field]
    if torsions:
        molecule["torsions"] = dict(_torsion(text) for text in torsions)
    files = {"files": [str(file.absolute()) for file in trajectories]}
    tables = {
        "output": f"runs/{topology.stem}",
        **tables,
        **_given(output=None if output is None else str(output), seed=seed, workers=workers),
        "molecule": {**molecule, **_given(temperature=temperature)},
        "trajectory": {
            **tables.get("trajectory", {}),
            **files,
            **_given(discard=discard, stride=stride, relaxation_steps=relaxation_steps),
        },
        "reweight": {**tables.get("reweight", {}), **_given(samples=samples)},
    }
    try:
        return Workflow.model_validate(tables)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError("these options cannot be used:\n" + "\n".join(lines)) from error


def run(workflow: Workflow, scheduler: str | Client | None = None) -> dict[str, Any]:
    """Read, train and reweight, continuing where an earlier run stopped; return what ``results.json`` holds.

    Args:
        workflow: from :func:`workflow_from`.
        scheduler: see :func:`flowbridge.workflows.machines.machines_for`.
    """
    workflow.output.mkdir(parents=True, exist_ok=True)
    molecule = molecular_system(workflow, Path())
    say(f"{workflow.molecule.name}: {molecule.system.getNumParticles()} atoms -> {workflow.output}")
    with machines_for(workflow, scheduler) as machines:
        data = training_data(workflow, molecule, Path(), machines)
        say("2 train")
        trained = train.run(workflow, workflow.model, molecule, data, workflow.output, "train", machines)
        if not is_main_process():
            return {}
        say("3 reweight")
        weighted = reweight.run(workflow, molecule, trained, workflow.output, machines)
    model = load_generator(trained)
    named = {name: molecule.torsion_atoms(atoms) for name, atoms in workflow.molecule.torsions.items()}
    sets = [
        WeightedSamples.load(reweight.sample_file(weighted, number))
        for number in range(workflow.reweight.independent_sets)
    ]
    found = averages(sets, load_frames(data).training, named or rotatable_torsions(model, molecule))
    results: dict[str, Any] = {"molecule": workflow.molecule.name, "seed": workflow.seed}
    for stage in (data, trained, weighted):
        hidden = ("wall_seconds", "curves", "profile")
        results.update({key: value for key, value in (stage.results or {}).items() if key not in hidden})
    results["averages"] = [average._asdict() for average in found]
    name = trained.folder / "model.flow"
    shutil.copyfile(name, workflow.output / "model.flow")
    sets[0].save(workflow.output / "samples.h5", single_precision=True)
    write_json(workflow.output / "results.json", results)
    _print(results, found, workflow.output)
    _warn_of_missing_conformations(sets, rotatable_torsions(model, molecule))
    return results


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _torsion(text: str) -> tuple[str, list[int | str]]:
    name, separator, atoms = text.partition("=")
    parts = [part.strip() for part in atoms.split(",")]
    if not (separator and name.strip()) or len(parts) != 4 or not all(parts):
        raise ConfigurationError(f"a torsion is NAME=A,B,C,D with four atoms, indices or RESIDUE:NAME; got {text!r}")
    return name.strip(), [int(part) if part.isdigit() else part for part in parts]


def _warn_of_missing_conformations(
    sets: Sequence[WeightedSamples], torsions: Mapping[str, tuple[int, int, int, int]]
) -> None:
    """Say where the heaviest sample is, if it is far heavier than the others."""
    heaviest = max(sets, key=lambda one: largest_weight_ratio(one.log_weights))
    ratio = largest_weight_ratio(heaviest.log_weights)
    if ratio < _HEAVY:
        return
    positions = heaviest.positions[np.argmax(heaviest.log_weights)]
    angles = ", ".join(f"{name} {np.degrees(torsion_angles(positions, four)):.0f}" for name, four in torsions.items())
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"warning: the heaviest sample has {ratio:.0f} times the mean weight: the force field populates a conformation that "
        f"the flow hardly samples, so errors are too small. Add a trajectory that starts near it, at torsions (degrees) "
        f"{angles}",
        style="yellow",
        markup=False,
    )


def _print(results: dict[str, Any], found: Sequence[Average], output: Path) -> None:
    console = Console()
    table = Table(title=f"{results['molecule']}: averages", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("reweighted", "error", "training data"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(one.name, f"{one.value:.4g}", f"{one.error:.2g}", f"{one.training:.4g}")
    console.print(table)
    percents = ", ".join(f"{percent:.1f} %" for percent in results["ess_percent_of_each_set"])
    console.print(f"effective sample size of each set of {results['samples']:,} samples: {percents}", soft_wrap=True)
    for file, what in (
        ("model.flow", "the generator"),
        ("samples.h5", "weighted samples"),
        ("results.json", "all numbers"),
    ):
        console.print(f"{output / file}: {what}", soft_wrap=True)
