"""The TOML of ``flowbridge coarse-grain``, validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ...core.configuration import StrictModel
from ...forcefields.networks.invariant_network import InvariantConfiguration, NetworkConfiguration
from ...forcefields.prior_statistics import PriorConfiguration
from ...forcefields.training.augmented_flow import TeacherConfiguration
from ...forcefields.training.configuration import CoarseTrainingConfiguration
from ..boltzmann.configuration import TorsionAtoms, read_tables, validated


class AllAtomModel(StrictModel):
    """A molecule with a force field. Paths are relative to the TOML file."""

    structure: Path | None = None
    sequence: str | None = Field(default=None, description="one-letter codes of a peptide, instead of a structure")
    force_field: tuple[str, ...] = ()
    system: Path | None = None
    constraints: Literal["hydrogen_bonds", "none"] = Field(
        default="hydrogen_bonds", description="of the System that a force field makes; a serialised System has its own"
    )
    water_box: PositiveFloat | None = Field(
        default=None, description="nm, edge of a cubic box of the water that force_field describes; None for no water"
    )
    cutoff: PositiveFloat = Field(default=0.9, description="nm, in a water box")


class StructureBasedModel(StrictModel):
    """A Go model on the alpha carbons of a native structure."""

    structure: Path
    epsilon: PositiveFloat = Field(description="kJ/mol")
    contact_cutoff: PositiveFloat = Field(default=0.7, description="nm")
    contact_strength: PositiveFloat = Field(default=2.0, description="in epsilon")


class TorsionBias(StrictModel):
    """A bias that flattens one torsion while the reference is sampled; frames are weighted back."""

    torsion: TorsionAtoms
    steps: PositiveInt = Field(default=1_000_000, description="of the metadynamics that finds the bias")
    bias_factor: float = Field(default=10.0, gt=1.0)
    harmonics: PositiveInt = 6


class Sampling(StrictModel):
    """Reference trajectories, with forces."""

    runs: PositiveInt = 4
    frames: PositiveInt = Field(default=25_000, description="of one run")
    frame_interval: PositiveInt = Field(default=25, description="steps")
    step_fs: PositiveFloat = 2.0
    friction_per_ps: PositiveFloat = 1.0
    equilibration_steps: NonNegativeInt = 10_000
    platform: str = Field(default="Reference", description="of OpenMM; CPU or CUDA for a box of water")
    bias: TorsionBias | None = None


class ReferenceFiles(StrictModel):
    """Trajectories that exist already, of the atoms of the all-atom model."""

    files: tuple[Path, ...] = Field(min_length=1, description="DCD, XTC, HDF5 ...; relative to the TOML file")
    discard: NonNegativeInt = 0
    stride: PositiveInt = 1


class Beads(StrictModel):
    """The mapping."""

    name: Literal["five_beads", "alpha_carbons", "backbone"] | None = None
    selections: dict[str, str] = Field(default_factory=dict, description="bead -> selection in mdtraj's language")
    slices: bool = Field(default=False, description="selections are single atoms")
    complete: bool = Field(default=False, description="refuse selections that leave atoms out")
    force_map: Literal["optimised", "plain"] = "optimised"

    @model_validator(mode="after")
    def _one_mapping(self) -> Beads:
        if self.name is not None and self.selections:
            raise ValueError("give a name or selections, not both")
        return self


class Dynamics(StrictModel):
    """Simulation of the coarse-grained force field: parallel tempering, or plain dynamics with one temperature."""

    temperatures: tuple[PositiveFloat, ...] = Field(default=(), description="K; empty: that of the reference alone")
    replicas: PositiveInt = Field(default=100, description="independent ones at each temperature")
    step_fs: PositiveFloat = 2.0
    friction_per_ps: PositiveFloat = 1.0
    equilibration_frames: NonNegativeInt = 10
    frames: PositiveInt = 100
    frame_interval: PositiveInt = Field(default=250, description="steps")
    exchange_interval: PositiveInt = 500


class Analysis(StrictModel):
    """What the coarse-grained ensemble is compared by."""

    torsions: dict[str, tuple[int, int, int, int]] = Field(
        default_factory=dict, description="one or two named torsions of beads, for a free-energy surface"
    )
    bins: PositiveInt = Field(default=36, description="of a torsion")
    contact_cutoff: PositiveFloat | None = Field(
        default=None, description="nm; of native contacts; needs a structure-based model or native_structure"
    )
    native_structure: Path | None = Field(default=None, description="PDB file with the beads, where no model has one")
    folded: float = Field(default=0.5, gt=0.0, lt=1.0, description="fraction of native contacts that counts as folded")
    slow_lag: NonNegativeInt = Field(default=0, description="frames; a surface on two slow coordinates (deeptime)")

    @model_validator(mode="after")
    def _few_torsions(self) -> Analysis:
        if len(self.torsions) > 2:
            raise ValueError("a surface has one or two torsions")
        return self


class CoarseGraining(StrictModel):
    """The whole file."""

    name: str
    output: Path = Field(default=Path("runs/coarse_grain"), description="relative to the current folder")
    seed: int = 1
    workers: PositiveInt = 1
    temperature: PositiveFloat = Field(default=300.0, description="K")
    all_atom: AllAtomModel | None = None
    structure_based: StructureBasedModel | None = None
    sampling: Sampling = Field(default_factory=Sampling)
    trajectory: ReferenceFiles | None = Field(default=None, description="instead of sampling")
    beads: Beads = Field(default_factory=Beads)
    prior: PriorConfiguration = Field(default_factory=PriorConfiguration)
    network: NetworkConfiguration = Field(default_factory=InvariantConfiguration)
    teacher: TeacherConfiguration = Field(default_factory=TeacherConfiguration)
    training: CoarseTrainingConfiguration = Field(default_factory=CoarseTrainingConfiguration)
    dynamics: Dynamics = Field(default_factory=Dynamics)
    analysis: Analysis = Field(default_factory=Analysis)

    @model_validator(mode="after")
    def _one_model(self) -> CoarseGraining:
        if (self.all_atom is None) == (self.structure_based is None):
            raise ValueError("give exactly one of [all_atom] and [structure_based]")
        if self.structure_based is not None and (self.trajectory or self.beads.name or self.beads.selections):
            raise ValueError("a structure-based model has beads already: leave out [trajectory] and the mapping")
        if self.all_atom is not None and not (self.beads.name or self.beads.selections):
            raise ValueError("[beads] needs a name (five_beads, alpha_carbons, backbone) or selections")
        if self.all_atom is not None and self.all_atom.water_box is not None:
            if self.sampling.bias is not None or self.trajectory is not None or self.all_atom.system is not None:
                raise ValueError(
                    "water_box goes with force_field and plain sampling: neither bias, nor [trajectory], nor system"
                )
            if self.all_atom.water_box < 2.0 * self.all_atom.cutoff:
                raise ValueError("water_box must be at least twice the cutoff")
        if self.trajectory is not None and self.sampling.bias is not None:
            raise ValueError("a bias belongs to sampling, and [trajectory] takes its place")
        return self


def read_coarse_graining(path: Path, overrides: dict[str, Any] | None = None) -> CoarseGraining:
    """Read and validate a file; raises ConfigurationError naming file, key and reason."""
    return validated(CoarseGraining, {**read_tables(path), **(overrides or {})}, f"{path} cannot be used")
