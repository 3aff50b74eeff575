"""The TOML of a workflow, validated: every key has a type, a unit and a default, and unknown keys are refused."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError
from ...core.execution.progress import console
from ...flows.boltzmann.configuration import FlowConfiguration
from ...flows.boltzmann.training.configuration import TrainingConfiguration
from .requirements import Requirements

Atom = int | str
TorsionAtoms = Annotated[tuple[Atom, Atom, Atom, Atom], Field(description="indices or RESIDUE:NAME labels")]


class Molecule(StrictModel):
    """What is simulated. Paths are relative to the TOML file."""

    name: str
    structure: Path | None = None
    smiles: str | None = None
    sequence: str | None = Field(default=None, description="one-letter codes of a peptide, instead of a structure")
    force_field: tuple[str, ...] = ()
    system: Path | None = None
    temperature: PositiveFloat = Field(default=300.0, description="K")
    torsions: dict[str, TorsionAtoms] = Field(
        default_factory=dict, description="named torsions for figures and basins; phi and psi give Ramachandran plots"
    )


class Basin(StrictModel):
    """A place to start trajectories from."""

    name: str
    torsions: dict[str, float] = Field(description="name of a torsion of [molecule.torsions] -> degrees")
    trajectories: PositiveInt = 8
    frames: PositiveInt | None = Field(default=None, description="instead of the section's frames")


class Simulate(StrictModel):
    """Training data: short trajectories from named or automatic starting basins."""

    step_fs: PositiveFloat = 1.0
    friction_per_ps: PositiveFloat = 2.0
    equilibration_steps: PositiveInt = 1000
    frame_interval: PositiveInt = Field(default=40, description="steps between kept frames")
    frames: PositiveInt = Field(default=1200, description="frames of one trajectory")
    basins: tuple[Basin, ...] = Field(default=(), description="empty: found automatically")
    automatic_basins: PositiveInt = Field(default=8, description="at most this many automatic basins")
    automatic_trajectories: PositiveInt = 4
    held_out: float = Field(default=0.1, gt=0.0, lt=0.9, description="share of trajectories kept for tests")


class TrajectoryFiles(StrictModel):
    """Trajectories that exist already, in the place of simulated training data."""

    files: tuple[Path, ...] = Field(min_length=1, description="DCD, XTC, HDF5, ASE ...; relative to the TOML file")
    discard: NonNegativeInt = Field(default=0, description="frames at the beginning of each file")
    stride: PositiveInt = Field(default=1, description="keep every so many frames")
    held_out: float = Field(default=0.1, gt=0.0, lt=0.9, description="share at the end of each file kept for tests")
    relaxation_steps: NonNegativeInt = Field(
        default=0, description="Langevin steps without constraints from each frame, which then counts as a start only"
    )
    relaxation_friction_per_ps: PositiveFloat = 10.0


class FreeEnergyDifference(StrictModel):
    """Two basins: a named torsion inside and outside an interval (degrees)."""

    torsion: str = "phi"
    interval: tuple[float, float] = (0.0, 180.0)


class FlowDynamics(StrictModel):
    """Dynamics under the energy of the flow, in OpenMM and ASE."""

    nve_step_fs: PositiveFloat = 1.0
    nve_steps: PositiveInt = 5000
    nve_runs: PositiveInt = 4
    equilibration_steps: PositiveInt = 1000
    langevin_step_fs: PositiveFloat = 2.0
    langevin_friction_per_ps: PositiveFloat = 1.0
    hydrogen_mass: PositiveFloat | None = Field(default=None, description="amu, for the Langevin run")
    langevin_runs: PositiveInt = Field(default=2, description="independent Contexts, over the workers")
    replicas: PositiveInt = Field(default=64, description="copies of the molecule in each of them, driven as one batch")
    langevin_steps: PositiveInt = 20_000
    discarded_steps: PositiveInt = 5_000
    frame_interval: PositiveInt = 50
    ase_nve_steps: PositiveInt = 200
    ase_langevin_steps: PositiveInt = 2000
    histogram_bins: PositiveInt = Field(default=24, description="bins per torsion for the Jensen-Shannon divergence")


class Reweight(StrictModel):
    """Weighted samples of the final model."""

    samples: PositiveInt = 100_000
    independent_sets: PositiveInt = Field(default=2, ge=1)
    bootstrap: PositiveInt = 200
    free_energy: FreeEnergyDifference | None = None


class Reference(StrictModel):
    """The reference free energy: metadynamics builds a bias, independent biased runs are reweighted."""

    file: Path = Field(description="where the result is stored, and read from by the workflow")
    torsions: tuple[str, ...] = ("phi", "psi")
    step_fs: PositiveFloat = 2.0
    friction_per_ps: PositiveFloat = 2.0
    bias_factor: float = Field(default=10.0, gt=1.0)
    bias_runs: PositiveInt = 2
    bias_steps: PositiveInt = 1_500_000
    starts: PositiveInt = 16
    steps: PositiveInt = 3_000_000
    discarded_steps: PositiveInt = 50_000
    frame_interval: PositiveInt = 50


class Model(StrictModel):
    """One flow: its architecture and how it is trained."""

    flow: FlowConfiguration = Field(default_factory=FlowConfiguration)
    training: TrainingConfiguration = Field(default_factory=TrainingConfiguration)


class Workflow(StrictModel):
    """The whole file."""

    output: Path = Field(default=Path("runs/workflow"), description="relative to the current folder")
    seed: int = 1
    workers: PositiveInt = 2
    molecule: Molecule
    simulate: Simulate = Field(default_factory=Simulate)
    trajectory: TrajectoryFiles | None = Field(default=None, description="instead of simulating")
    model: Model = Field(default_factory=Model)
    comparison: Model | None = Field(default=None, description="a second flow on the same data, for the report")
    dynamics: FlowDynamics = Field(default_factory=FlowDynamics)
    reweight: Reweight = Field(default_factory=Reweight)
    reference: Reference | None = None
    targets: Requirements = Field(
        default_factory=Requirements, description="requirements that results are checked against; none by default"
    )

    @model_validator(mode="after")
    def _names_exist(self) -> Workflow:
        known = set(self.molecule.torsions)
        used = {name for basin in self.simulate.basins for name in basin.torsions}
        if self.reweight.free_energy is not None:
            used.add(self.reweight.free_energy.torsion)
        if self.reference is not None:
            used.update(self.reference.torsions)
        if used - known:
            raise ValueError(
                f"torsions {sorted(used - known)} are used but not defined: add them to [molecule.torsions]"
                f" (defined there: {sorted(known) or 'none'})"
            )
        return self


FORMER_NAMES = {"drive": "dynamics"}
"""Tables of a workflow by the names of former versions."""


def read_tables(
    path: Path, former_names: Mapping[str, str] | None = None, *, extended_by: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Return the tables of a TOML file on top of those of the file that it extends.

    Args:
        path: TOML file.
        former_names: tables that are accepted by a former name, with a warning: former to present name.
        extended_by: files that extend this one.

    Raises:
        ConfigurationError: for a file that cannot be read, and files that extend each other.
    """
    if not path.is_file():
        raise ConfigurationError(f"the workflow file {path} does not exist")
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error
    for former, present in (former_names or {}).items():
        if former in data:
            if present in data:
                raise ConfigurationError(
                    f"{path} has both [{present}] and [{former}], its former name: keep [{present}]"
                )
            data[present] = data.pop(former)
            console.print(
                f"warning: {path}: the table [{former}] is called [{present}] now", style="yellow", markup=False,
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    base = data.pop("extends", None)
    if base is None:
        return data
    if not (path.parent / base).is_file():
        raise ConfigurationError(f"{path} extends {base}, which does not exist next to it")
    chain = (*extended_by, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigurationError(f"{path} extends {base}, which extends it in turn")
    return _merged(read_tables(path.parent / base, former_names, extended_by=chain), data)


def read_workflow(path: Path, overrides: dict[str, Any] | None = None) -> Workflow:
    """Read and validate a workflow file; raises ConfigurationError naming file, key and reason."""
    return validated(Workflow, _merged(read_tables(path, FORMER_NAMES), overrides or {}), f"{path} cannot be used")


Settings = TypeVar("Settings", bound=StrictModel)


def validated(model: type[Settings], tables: Mapping[str, Any], problem: str) -> Settings:
    """Return validated settings; raises ConfigurationError with the problem, and each key with its reason."""
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError(f"{problem}:\n" + "\n".join(lines)) from error


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` on top, table by table; lists and values are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both_tables else value
    return merged
