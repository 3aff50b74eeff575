"""``flowbridge train``: from a trajectory and a force field to a trained generator and reweighted averages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ConfigurationError
from ..runner import Selection
from .configuration import FORMER_NAMES, Workflow, read_tables, validated
from .pipeline import run_workflow

if TYPE_CHECKING:
    from distributed import Client


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
        seed: random seed.
        workers: number of processes.

    Raises:
        ConfigurationError: for options that contradict each other or the configuration.
    """
    tables: dict[str, Any] = read_tables(configuration, FORMER_NAMES) if configuration is not None else {}
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
    return validated(Workflow, tables, "these options cannot be used")


def train_from_trajectory(
    workflow: Workflow, scheduler: str | Client | None = None, selection: Selection | None = None
) -> dict[str, Any]:
    """Read, train and reweight, continuing where an earlier run stopped; return what ``results.json`` holds.

    Args:
        workflow: from :func:`workflow_from`.
        scheduler: see :func:`flowbridge.workflows.machines.machines_for`.
        selection: stages that are asked for.
    """
    return run_workflow(workflow, Path(), scheduler, selection, dynamics=False)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _torsion(text: str) -> tuple[str, list[int | str]]:
    name, separator, atoms = text.partition("=")
    parts = [part.strip() for part in atoms.split(",")]
    if not (separator and name.strip()) or len(parts) != 4 or not all(parts):
        raise ConfigurationError(f"a torsion is NAME=A,B,C,D with four atoms, indices or RESIDUE:NAME; got {text!r}")
    return name.strip(), [int(part) if part.isdigit() else part for part in parts]
