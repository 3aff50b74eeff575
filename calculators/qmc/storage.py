"""Wave functions, samples and densities to and from files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigurationError, ModelFileError, MoleculeMismatchError
from ...core.statistics.bootstrap import Estimate
from .density.convex_fit import ConvexFit
from .density.densities import DensityModel, OrbitalDensity, SumDensity
from .density.linear_log_density import LinearLogDensity
from .density.neural_density import NeuralDensity
from .files import read_file, write_file
from .molecule import Molecule
from .wave_function.atomic_functions import AtomicFunctions, Shell
from .wave_function.determinants import Excitations, Expansion
from .wave_function.jastrow import Jastrow
from .wave_function.linear_method import OptimisationState, OptimisationStep
from .wave_function.sampling import ElectronSamples, SamplerState
from .wave_function.slater_orbitals import SlaterOrbitals
from .wave_function.wave_function import SlaterJastrow

PathLike = str | os.PathLike[str]


def save_samples(path: PathLike, samples: ElectronSamples, state: SamplerState | None = None) -> None:
    """Write samples; with the sampler's ``state``, a run continues from the file."""
    tensors = {
        "positions": samples.positions,
        "scores": samples.scores,
        "kinetic": samples.kinetic,
        "potential": samples.potential,
    }
    if samples.log_absolute is not None:
        tensors["log_absolute"] = samples.log_absolute
    content: dict[str, Any] = {"molecule": samples.molecule.to_dict(), "acceptance": samples.acceptance}
    if state is not None:
        content["step"] = state.step
        tensors |= {"walkers": state.positions, "generator": state.generator_state}
    write_file(path, "samples", content, tensors)


def load_samples(path: PathLike, molecule: Molecule | None = None) -> ElectronSamples:
    """Read samples of electrons, from flowbridge or another program.

    Args:
        path: the file.
        molecule: molecule of the samples at its present position; None for any.

    Raises:
        ModelFileError: when the file cannot be used.
        MoleculeMismatchError: for another molecule.
    """
    with _reading(path, "samples") as (content, tensors):
        own = Molecule.from_dict(content["molecule"])
        placed = _placed(path, own, molecule)
        return ElectronSamples(
            placed,
            tensors["positions"].double() + (placed.centers[0] - own.centers[0]),
            tensors["scores"].double(),
            tensors["kinetic"].double(),
            tensors["potential"].double(),
            float(content.get("acceptance", 1.0)),
            tensors["log_absolute"].double() if "log_absolute" in tensors else None,
        )


def load_sampler_state(path: PathLike) -> SamplerState:
    """Read the state of the sampler that wrote the samples."""
    with _reading(path, "samples") as (content, tensors):
        return SamplerState(tensors["walkers"], float(content["step"]), tensors["generator"])


def save_wave_function(path: PathLike, wave_function: SlaterJastrow, state: OptimisationState | None = None) -> None:
    """Write a wave function; with the optimisation's ``state``, it continues from the file."""
    orbitals = wave_function.orbitals
    tensors: dict[str, Tensor] = {"up": orbitals.up, "down": orbitals.down}
    content: dict[str, Any] = {
        "molecule": wave_function.molecule.to_dict(),
        "shells": _shells(orbitals.functions),
        "misfit": orbitals.misfit,
        "restricted": orbitals.restricted,
        "jastrow": None,
        "expansion": None,
    }
    jastrow = wave_function.jastrow
    if jastrow is not None and wave_function.jastrow_parameters is not None:
        content["jastrow"] = {"elements": jastrow.elements.tolist(), "shells": _shells(jastrow.one_electron)}
        tensors |= {"jastrow": wave_function.jastrow_parameters, "contraction": jastrow.contraction}
        if jastrow.polarising is not None:
            content["jastrow"]["polarising"] = _shells(jastrow.polarising[0])
            tensors["polarising"] = jastrow.polarising[1]
    if wave_function.expansion is not None:
        content["expansion"] = {
            "up": asdict(wave_function.expansion.up),
            "down": asdict(wave_function.expansion.down),
        }
        tensors["coefficients"] = wave_function.expansion.coefficients
    if wave_function.mixing is not None:
        tensors["mixing"] = wave_function.mixing
    if state is not None:
        content["step"] = state.sampler.step
        content["history"] = [
            [step.energy.value, step.energy.error, step.variance, step.length] for step in state.history
        ]
        tensors |= {"walkers": state.sampler.positions, "generator": state.sampler.generator_state}
    write_file(path, "wave_function", content, tensors)


def load_wave_function(path: PathLike, molecule: Molecule | None = None) -> SlaterJastrow:
    """Read a wave function.

    Raises:
        ModelFileError: when the file cannot be used.
        MoleculeMismatchError: when it belongs to another molecule than ``molecule``, which may be shifted, but not rotated.
    """
    with _reading(path, "wave_function") as (content, tensors):
        own = _placed(path, Molecule.from_dict(content["molecule"]), molecule)
        functions = AtomicFunctions(own.centers, _read_shells(content["shells"]))
        orbitals = SlaterOrbitals(functions, tensors["up"], tensors["down"], content["misfit"], content["restricted"])
        jastrow = None
        if content["jastrow"] is not None:
            polarising = None
            if "polarising" in content["jastrow"]:
                shells = _read_shells(content["jastrow"]["polarising"])
                polarising = AtomicFunctions(own.centers, shells), tensors["polarising"]
            jastrow = Jastrow(
                own.centers,
                torch.tensor(content["jastrow"]["elements"]),
                own.spin_up,
                own.electrons,
                AtomicFunctions(own.centers, _read_shells(content["jastrow"]["shells"])),
                tensors["contraction"],
                polarising,
            )
        expansion = None
        if content["expansion"] is not None:
            up, down = (_read_excitations(content["expansion"][spin]) for spin in ("up", "down"))
            expansion = Expansion(up, down, tensors["coefficients"])
        return SlaterJastrow(own, orbitals, jastrow, tensors.get("jastrow"), expansion, tensors.get("mixing"))


def load_optimisation(path: PathLike, molecule: Molecule | None = None) -> OptimisationState:
    """Read a wave function with its walkers, to continue its optimisation or to sample it."""
    wave_function = load_wave_function(path, molecule)
    with _reading(path, "wave_function") as (content, tensors):
        history = tuple(
            OptimisationStep(Estimate(value, error), variance, length)
            for value, error, variance, length in content["history"]
        )
        return OptimisationState(
            wave_function, SamplerState(tensors["walkers"], float(content["step"]), tensors["generator"]), history
        )


def save_density(path: PathLike, density: DensityModel) -> None:
    """Write a fitted or closed-form density.

    Raises:
        ConfigurationError: for a kind of density that has no file format.
    """
    content, tensors = _describe(density, "")
    write_file(path, "density", {"molecule": density.molecule.to_dict(), "density": content}, tensors)


def load_density(path: PathLike, molecule: Molecule | None = None) -> DensityModel:
    """Read a density.

    Raises:
        ModelFileError: when the file cannot be used.
        MoleculeMismatchError: when it belongs to another molecule than ``molecule``, which may be shifted, but not rotated.
    """
    with _reading(path, "density") as (content, tensors):
        own = _placed(path, Molecule.from_dict(content["molecule"]), molecule)
        return _rebuild(content["density"], tensors, "", own)


def _describe(density: DensityModel, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(density, OrbitalDensity):
        return (
            {"model": "orbitals", "shells": _shells(density.functions)},
            {f"{prefix}orbitals": density.coefficients, f"{prefix}occupations": density.occupations},
        )
    if isinstance(density, LinearLogDensity):
        base, tensors = _describe(density.base, f"{prefix}base.")
        tensors |= {
            f"{prefix}contraction": density.contraction,
            f"{prefix}coefficients": density.coefficients,
            f"{prefix}shifts": density.shifts,
        }
        content = {
            "model": "linear",
            "base": base,
            "shells": _shells(density.functions),
            "electrons": density.electrons,
        }
        return content, tensors
    if isinstance(density, NeuralDensity):
        return (
            {"model": "neural", "electrons": density.electrons, "width": density.width},
            {f"{prefix}{name}": tensor for name, tensor in density.network.state_dict().items()}
            | {f"{prefix}refit": density.refit.coefficients, f"{prefix}shifts": density.refit.shifts},
        )
    if isinstance(density, SumDensity):
        up, tensors = _describe(density.up, f"{prefix}up.")
        down, more = _describe(density.down, f"{prefix}down.")
        return {"model": "sum", "up": up, "down": down}, tensors | more
    raise ConfigurationError(
        f"a {type(density).__name__} cannot be stored: files hold fitted densities and those of determinants"
    )


def _rebuild(content: dict[str, Any], tensors: dict[str, Tensor], prefix: str, molecule: Molecule) -> DensityModel:
    model = content["model"]
    if model == "sum":
        return SumDensity(
            _rebuild(content["up"], tensors, f"{prefix}up.", molecule),
            _rebuild(content["down"], tensors, f"{prefix}down.", molecule),
        )
    if model == "neural":
        refit = ConvexFit(tensors[f"{prefix}refit"], tensors[f"{prefix}shifts"])
        density = NeuralDensity(molecule, float(content["electrons"]), int(content["width"]), refit)
        own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        density.network.load_state_dict({name: own[name] for name in density.network.state_dict()})
        return density
    functions = AtomicFunctions(molecule.centers, _read_shells(content["shells"]))
    if model == "orbitals":
        return OrbitalDensity(molecule, functions, tensors[f"{prefix}orbitals"], tensors[f"{prefix}occupations"])
    if model != "linear":
        raise ValueError(f"a density of the unknown model {model!r}")
    base = _rebuild(content["base"], tensors, f"{prefix}base.", molecule)
    if not isinstance(base, OrbitalDensity):
        raise ValueError("the base of a linear density must be one of orbitals")
    return LinearLogDensity(
        base, functions, tensors[f"{prefix}contraction"], tensors[f"{prefix}coefficients"], tensors[f"{prefix}shifts"],
        float(content["electrons"]),
    )  # fmt: skip


@contextmanager
def _reading(path: PathLike, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Give content and tensors of a file; errors from incomplete content become errors that name the file."""
    try:
        yield read_file(path, kind)
    except (ModelFileError, MoleculeMismatchError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{Path(path).absolute()}: lacks something, or does not fit together ({type(error).__name__}: {error}). "
            "Compute it again"
        ) from error


def _placed(path: PathLike, own: Molecule, wanted: Molecule | None) -> Molecule:
    """Return the wanted molecule if the file's is the same: it may be shifted, but not rotated or changed."""
    if wanted is None:
        return own
    moved = wanted
    if len(own.numbers) == len(wanted.numbers):
        shift = wanted.centers[0] - own.centers[0]
        moved = Molecule.build(wanted.numbers, wanted.centers - shift, wanted.charge, wanted.spin)
    if not own.same_as(moved, 1e-4):
        raise MoleculeMismatchError(
            f"{Path(path).absolute()}: belongs to another molecule: {_described(own)}; needed: {_described(wanted)}"
        )
    return wanted


def _described(molecule: Molecule) -> str:
    places = ", ".join(
        f"{label} ({x:.3f} {y:.3f} {z:.3f})"
        for label, (x, y, z) in zip(molecule.labels(), molecule.positions, strict=True)
    )
    return f"{places} bohr, charge {molecule.charge}, spin {molecule.spin}"


def _shells(functions: AtomicFunctions) -> list[list[Any]]:
    return [[shell.center, shell.degree, shell.family, shell.parameter] for shell in functions.shells]


def _read_shells(rows: Sequence[Sequence[Any]]) -> list[Shell]:
    return [
        Shell(int(center), int(degree), str(family), float(parameter)) for center, degree, family, parameter in rows
    ]


def _read_excitations(data: dict[str, Any]) -> Excitations:
    return Excitations(
        int(data["occupied"]),
        int(data["orbitals"]),
        tuple(tuple(int(p) for p in row) for row in data["holes"]),
        tuple(tuple(int(q) for q in row) for row in data["particles"]),
        tuple(int(sign) for sign in data["signs"]),
    )
