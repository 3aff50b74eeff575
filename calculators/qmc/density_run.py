"""From a molecule to its density: trial wave function, optimisation, samples, fit. Each result is computed once.

With a folder, results are stored in files named by a digest of everything they depend on; a run that was stopped continues from
its last checkpoint to the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.errors import ConfigurationError, ModelFileError
from ...core.statistics.bootstrap import Estimate
from .density.convex_fit import DensityFitSettings
from .density.densities import DensityModel, SumDensity, base_density
from .density.linear_log_density import fit_linear_log_density
from .density.neural_density import NeuralFitSettings, fit_neural_density
from .density.parameter_response import ParameterSteps, parameter_steps, with_response
from .electronic_structure import Quadrature, becke_quadrature
from .molecule import Molecule
from .properties.properties import DensityProperties
from .properties.spin_contact import spin_contact_densities
from .storage import (
    load_density,
    load_optimisation,
    load_sampler_state,
    load_samples,
    load_wave_function,
    save_density,
    save_samples,
    save_wave_function,
)
from .wave_function.linear_method import OptimisationSettings, OptimisationState, optimise, start_optimisation
from .wave_function.sampling import (
    ElectronSamples,
    EquilibriumError,
    LangevinSampler,
    SamplerState,
    SamplingSettings,
    sample,
)
from .wave_function.trial_functions import TrialSettings, trial_wave_function
from .wave_function.wave_function import SlaterJastrow

_ALGORITHM = 3  # part of every digest: raise it when other numbers come out for the same settings
DENSITY_MODELS = ("linear", "neural", "determinant")
_CONFIGURATIONS = 50  # per parameter, at least, for a step of all parameters


class DensityProgress(NamedTuple):
    """Progress of a run: name of the stage, completed and total number of its steps, and a message."""

    stage: str
    done: int
    total: int
    message: str


Announce = Callable[[DensityProgress], Any]


@dataclass(frozen=True)
class RunSettings:
    """Settings that determine the density of a molecule.

    Attributes:
        trial: settings of the trial wave function.
        optimisation: settings of its optimisation; without effect on a determinant without a Jastrow factor.
        sampling: settings of the sampler of |Psi|^2.
        model: ``"linear"``, ``"neural"``, or ``"determinant"`` for the closed form without statistical error.
        fit: settings of the linear density.
        neural: settings of the neural density.
        spin_densities: whether to fit both spins separately; None does so for open shells.
        response: whether the linear density follows a last step of the parameters on the samples, so that its errors include
            their noise, see :mod:`~flowbridge.calculators.qmc.density.parameter_response`. It adds a fifth to the time.
        seed: random seed.

    Raises:
        ConfigurationError: for an unknown model.
    """

    trial: TrialSettings = field(default_factory=TrialSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    model: str = "linear"
    fit: DensityFitSettings = field(default_factory=DensityFitSettings)
    neural: NeuralFitSettings = field(default_factory=NeuralFitSettings)
    spin_densities: bool | None = None
    response: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        if self.model not in DENSITY_MODELS:
            raise ConfigurationError(
                f"the density model must be one of {', '.join(DENSITY_MODELS)}, got {self.model!r}"
            )
        if self.model == "determinant" and (self.trial.jastrow or self.trial.active_space is not None):
            raise ConfigurationError(
                "the closed form is the density of a single determinant: give jastrow=False with it"
            )


class DensityRun:
    """The density of one molecule and its intermediate results, each computed on first use.

    Args:
        molecule: nuclei and electrons.
        settings: see :class:`RunSettings`.
        folder: folder of the results; None for memory only.
        samples: samples of another program, instead of sampling; the base density is then that of the trial function.
        wave_function: wave function to sample, instead of an optimised one.
        announce: function that receives the progress.
    """

    def __init__(
        self,
        molecule: Molecule,
        settings: RunSettings | None = None,
        folder: Path | None = None,
        *,
        samples: ElectronSamples | None = None,
        wave_function: SlaterJastrow | None = None,
        announce: Announce | None = None,
    ) -> None:
        self.molecule, self.settings, self.folder = molecule, settings or RunSettings(), folder
        self._given_samples, self._given_wave_function = samples, wave_function
        self._announce = announce or (lambda progress: None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def grid(self) -> Quadrature:
        """The quadrature for the density."""
        return becke_quadrature(self.molecule, self.settings.trial.grid_level)

    @cached_property
    def optimisation(self) -> OptimisationState:
        """The optimised wave function with its walkers."""
        settings = self.settings
        walkers = {"walkers": settings.sampling.walkers}
        file = self._file("wave_function", asdict(settings.trial), asdict(settings.optimisation), walkers)
        state = _loaded(file, lambda path: load_optimisation(path, self.molecule))
        if state is None:
            trial = self._given_wave_function or self._trial
            generator = torch.Generator().manual_seed(settings.seed)
            self._announce(DensityProgress("equilibration", 0, 1, "walkers"))
            state = start_optimisation(trial, settings.sampling.walkers, settings.optimisation, generator)
            self._store(file, state)
        if self._given_wave_function is None:
            total = settings.optimisation.iterations
            for reached in optimise(state, settings.optimisation):
                state, step = reached, reached.history[-1]
                self._announce(
                    DensityProgress(
                        "optimisation", len(reached.history), total,
                        f"energy {step.energy.value:.4f} +- {step.energy.error:.4f} Hartree, variance {step.variance:.4f}",
                    )
                )  # fmt: skip
                self._store(file, state)
        return state

    @cached_property
    def parameter_steps(self) -> ParameterSteps | None:
        """A step of the optimised parameters on the samples; None without optimisation here or without ``response``.

        With fewer than fifty configurations per parameter it is None as well, with a warning.
        """
        settings = self.settings
        made_here = self._given_samples is None and self._given_wave_function is None
        parameters = sum(self.wave_function.parameter_counts)
        if not (settings.response and made_here and parameters and settings.optimisation.iterations):
            return None
        if self.samples.kinetic.numel() < _CONFIGURATIONS * parameters:
            warnings.warn(
                f"{self.samples.kinetic.numel()} configurations are too few to tell how noisy {parameters} parameters are: "
                "error bars will lack that. Give more sweeps or walkers, or response=False",
                stacklevel=2,
            )
            return None
        total = len(self.samples.kinetic)
        return parameter_steps(
            self.samples, self.wave_function, settings.fit.groups,
            progress=lambda done: self._announce(DensityProgress("parameters", done, total, "their noise")),
        )  # fmt: skip

    @cached_property
    def spin_contact_densities(self) -> Estimate[NDArray[np.float64]]:
        """Density of spin up less that of spin down at the nuclei ``(A,)``, in e/bohr^3.

        Raises:
            ConfigurationError: for samples of another program, whose wave function cannot be evaluated here.
        """
        if self._given_samples is not None:
            raise ConfigurationError(
                "spin densities at nuclei need the wave function, and these samples came without one: subtract the contact "
                "densities of both spins, density.up and density.down"
            )
        total = len(self.samples.kinetic)
        return spin_contact_densities(
            self.samples, self.wave_function, self.parameter_steps,
            progress=lambda done: self._announce(DensityProgress("spin density", done, total, "at nuclei")),
        )  # fmt: skip

    @property
    def wave_function(self) -> SlaterJastrow:
        """The optimised wave function; the trial function, as base of the fit, with samples of another program."""
        if self._given_wave_function is not None:
            return self._given_wave_function
        return self._trial if self._given_samples is not None else self.optimisation.wave_function

    @cached_property
    def _trial(self) -> SlaterJastrow:
        self._announce(DensityProgress("orbitals", 0, 1, "orbitals from PySCF, refitted to Slater functions"))
        return trial_wave_function(self.molecule, self.settings.trial).wave_function

    @cached_property
    def samples(self) -> ElectronSamples:
        """Electrons drawn from |Psi|^2, with scores."""
        if self._given_samples is not None:
            return self._given_samples
        settings = self.settings.sampling
        file = self._file("samples", asdict(self.settings.trial), asdict(self.settings.optimisation), asdict(settings))
        finished = _loaded(file, lambda path: load_samples(path, self.molecule))
        if finished is not None:
            finished.check_equilibrium()
            return finished
        part = None if file is None else file.with_suffix(".part.safetensors")
        recorded = _loaded(part, lambda path: (load_samples(path, self.molecule), load_sampler_state(path)))
        state = self.optimisation.sampler if recorded is None else recorded[1]
        sampler = LangevinSampler.resumed(self.wave_function, state)
        if recorded is None:
            self._announce(DensityProgress("equilibration", 0, 1, "walkers"))
            sampler.equilibrate(settings.equilibration)

        def checkpoint(so_far: ElectronSamples, now: SamplerState) -> None:
            if part is not None:
                save_samples(part, so_far, now)

        try:
            samples = sample(
                sampler,
                settings,
                recorded=None if recorded is None else recorded[0],
                checkpoint=checkpoint,
                progress=lambda done: self._announce(DensityProgress("sampling", done, settings.sweeps, "")),
            )
        except EquilibriumError as error:
            self._announce(DensityProgress("sampling", settings.sweeps, settings.sweeps, "not in equilibrium"))
            if file is not None:  # for inspection; never read as a result
                save_samples(file.with_name(f"not-in-equilibrium-{file.name}"), error.samples)
            raise
        if file is not None and part is not None:
            save_samples(file, samples)
            part.unlink(missing_ok=True)
        return samples

    @cached_property
    def density(self) -> DensityModel:
        """The density; for open shells the sum of both spins, which are its ``up`` and ``down``."""
        settings = self.settings
        file = None
        if self._given_samples is None and self._given_wave_function is None:
            file = self._file("density", asdict(settings))
        found = _loaded(file, lambda path: load_density(path, self.molecule))
        if found is None:
            apart = self.molecule.spin != 0 if settings.spin_densities is None else settings.spin_densities
            self._announce(DensityProgress("density", 0, 1, f"{settings.model} density"))
            if apart and self.molecule.spin_down:
                found = SumDensity(self._fitted("up"), self._fitted("down"))
            else:
                found = self._fitted("total")
            if file is not None:
                save_density(file, found)
        return found

    @cached_property
    def properties(self) -> DensityProperties:
        """Properties of the density, integrated on the molecule's grid."""
        return DensityProperties(self.density, self.grid)

    def _fitted(self, spin: str) -> DensityModel:
        settings = self.settings
        if settings.model == "neural":
            generator = torch.Generator().manual_seed(settings.seed)
            steps = settings.neural.steps
            return fit_neural_density(
                self.samples, self.grid, generator, settings.neural, spin,
                progress=lambda done: self._announce(DensityProgress("density", done, steps, "")),
            )  # fmt: skip
        base = base_density(self.wave_function, self.grid, spin)
        if settings.model == "determinant":
            return base
        fitted = fit_linear_log_density(self.samples, base, self.grid, settings.fit, spin)
        response = self.parameter_steps
        return fitted if response is None else with_response(fitted, self.samples, response, self.grid, spin)

    def _file(self, name: str, *parts: Any) -> Path | None:
        if self.folder is None or (self._given_wave_function is not None and name == "wave_function"):
            return None
        text = json.dumps([_ALGORITHM, self.molecule.to_dict(), self.settings.seed, *parts], sort_keys=True)
        if self._given_wave_function is not None:
            text += "given:" + _digest_of(self._given_wave_function)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"

    def _store(self, file: Path | None, state: OptimisationState) -> None:
        if file is not None:
            save_wave_function(file, state.wave_function, state)


def run_from_files(
    molecule: Molecule,
    settings: RunSettings,
    folder: Path | None = None,
    *,
    samples: Path | None = None,
    wave_function: Path | None = None,
    announce: Announce | None = None,
) -> DensityRun:
    """Return a run with samples or a wave function from a file.

    Raises:
        ModelFileError: when a file cannot be used.
        MoleculeMismatchError: when it belongs to another molecule.
    """
    return DensityRun(
        molecule,
        settings,
        folder,
        samples=None if samples is None else load_samples(samples, molecule),
        wave_function=None if wave_function is None else load_wave_function(wave_function, molecule),
        announce=announce,
    )


def _loaded(file: Path | None, load: Callable[[Path], Any]) -> Any:
    """Return the content of a file; None for a missing or damaged file."""
    if file is None or not file.is_file():
        return None
    try:
        return load(file)
    except ModelFileError:
        return None  # recomputed and replaced


def _digest_of(wave_function: SlaterJastrow) -> str:
    hasher = hashlib.sha256()
    for tensor in (wave_function.orbitals.up, wave_function.orbitals.down, wave_function.jastrow_parameters):
        if tensor is not None:
            hasher.update(tensor.numpy().tobytes())
    if wave_function.expansion is not None:
        hasher.update(wave_function.expansion.coefficients.numpy().tobytes())
    return hasher.hexdigest()
