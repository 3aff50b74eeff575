"""Configurations with weights: what a Boltzmann generator hands out and every analysis takes in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from .errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from .potential import Particles
from .sample_files import read_samples, write_samples
from .statistics.bootstrap import DEFAULT_REPLICAS, Estimate, FloatArray
from .statistics.estimates import (
    FreeEnergyProfile,
    checked_log_weights,
    effective_sample_percent,
    effective_sample_size,
    free_energy_difference,
    free_energy_profile,
    mean_with_error,
    scaled_weights,
)
from .units import thermal_energy

Observable = ArrayLike | Callable[[np.ndarray[Any, Any]], ArrayLike]
"""One value a sample ``(S, ...)``, or a function of the positions ``(S, N, 3)`` in nm that returns them."""


@dataclass(frozen=True, eq=False)
class WeightedSamples:
    """Configurations of one molecule with importance weights towards one ensemble.

    Attributes:
        positions: ``(S, N, 3)`` in nm, float32 or float64; other numbers become float64.
        log_weights: ``(S,)`` natural logarithms of weights, up to a common constant; zeros for samples that
            were drawn from the ensemble itself. ``-inf`` is a weight of zero.
        particles: the N particles, in the order of the positions.
        temperature: of the ensemble, K.
        reduced_potentials: name to ``(S,)``: ``U/kT`` of each ensemble that the samples were evaluated in,
            and ``-log q`` of the distribution that they were drawn from. By convention ``"target"`` is the
            ensemble that the weights lead to and ``"generator"`` the distribution; ``+inf`` is an impossible
            configuration.
        provenance: whatever is needed to make the samples again, ready for JSON: seed, digest of the model,
            name of the target, package versions.

    Raises:
        ValueError: where an array has the wrong shape or is empty, or a weight or position is NaN or
            infinite.
        NonFiniteEnergyError: where a reduced potential is NaN or ``-inf`` and the weight is not zero.
        ConfigurationError: where the provenance is not JSON.
    """

    positions: np.ndarray[Any, Any]
    log_weights: FloatArray
    particles: Particles
    temperature: float
    reduced_potentials: Mapping[str, FloatArray] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions)
        if positions.dtype not in (np.float32, np.float64):
            positions = positions.astype(np.float64)
        log_weights = checked_log_weights(self.log_weights)
        expected = (len(log_weights), len(self.particles), 3)
        if positions.shape != expected:
            raise ValueError(
                f"positions must be (samples, particles, 3) = {expected} for these weights and particles, "
                f"got {positions.shape}"
            )
        broken = ~np.isfinite(positions).all(axis=(1, 2))
        if broken.any():
            raise ValueError(
                f"{int(broken.sum())} of {len(broken)} configurations hold NaN or infinite positions, "
                f"the first at index {int(np.argmax(broken))}"
            )
        potentials = {
            str(name): _checked_reduced_potential(values, str(name), log_weights > -np.inf)
            for name, values in self.reduced_potentials.items()
        }
        thermal_energy(self.temperature)  # refuses what is no temperature
        try:
            provenance = json.loads(json.dumps(dict(self.provenance), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the provenance of samples must be plain JSON: {error}") from error
        for name, value in (
            ("positions", positions),
            ("log_weights", log_weights),
            ("reduced_potentials", potentials),
            ("temperature", float(self.temperature)),
            ("provenance", provenance),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.log_weights)

    def __repr__(self) -> str:
        return (
            f"WeightedSamples({len(self)} configurations of {len(self.particles)} particles at "
            f"{self.temperature:g} K, effective sample size {self.effective_sample_percent():.1f} %)"
        )

    @property
    def weights(self) -> FloatArray:
        """Weights ``(S,)`` that sum to one."""
        weights = scaled_weights(self.log_weights)
        return weights / weights.sum()

    def effective_sample_size(self) -> float:
        """Return Kish's effective sample size, unclipped (see :mod:`flowbridge.core.statistics.estimates`)."""
        return effective_sample_size(self.log_weights)

    def effective_sample_percent(self) -> float:
        """Return the effective sample size in percent of the number of samples."""
        return effective_sample_percent(self.log_weights)

    def evaluate(self, observable: Observable) -> np.ndarray[Any, Any]:
        """Return the values ``(S, ...)`` of an observable, an array or a function of the positions."""
        values = np.asarray(observable(self.positions) if callable(observable) else observable)
        if values.ndim == 0 or len(values) != len(self):
            raise ValueError(f"an observable needs one value for each of {len(self)} samples, got {values.shape}")
        return values

    def average(
        self,
        observable: Observable,
        *,
        blocks: int | None = None,
        replicas: int = DEFAULT_REPLICAS,
        seed: int = 0,
    ) -> Estimate[FloatArray]:
        """Return the reweighted average of an observable with its block bootstrap error.

        Args:
            observable: values ``(S, ...)`` or a function of the positions that returns them; cosine and sine
                rather than an angle.
            blocks: number of blocks of consecutive samples; None for 100.
            replicas: number of bootstrap replicas.
            seed: of the bootstrap.
        """
        values = self.evaluate(observable)
        return mean_with_error(values, self.log_weights, blocks=blocks, replicas=replicas, seed=seed)

    def free_energy_difference(
        self,
        region_a: Observable,
        region_b: Observable,
        *,
        blocks: int | None = None,
        replicas: int = DEFAULT_REPLICAS,
        seed: int = 0,
    ) -> Estimate[float]:
        """Return the free energy of region B relative to region A in kT with its block bootstrap error.

        Two ensembles, rather than two regions of one, are compared by :mod:`flowbridge.integrations.pymbar`.

        Args:
            region_a: boolean mask ``(S,)``, or a function of the positions that returns one.
            region_b: the same.
            blocks: number of blocks of consecutive samples; None for 100.
            replicas: number of bootstrap replicas.
            seed: of the bootstrap.

        Raises:
            OverlapError: when a region holds no sample, or none with weight.
        """
        masks = self.evaluate(region_a), self.evaluate(region_b)
        return free_energy_difference(*masks, self.log_weights, blocks=blocks, replicas=replicas, seed=seed)

    def free_energy_profile(
        self,
        observable: Observable,
        bins: int | ArrayLike,
        period: float | None = None,
        *,
        blocks: int | None = None,
        replicas: int = DEFAULT_REPLICAS,
        seed: int = 0,
    ) -> FreeEnergyProfile:
        """Return the free energy along an observable ``(S,)`` in kT, with an error for each bin.

        Arguments as for :func:`flowbridge.core.statistics.estimates.free_energy_profile`.
        """
        values = self.evaluate(observable)
        return free_energy_profile(values, self.log_weights, bins, period, blocks=blocks, replicas=replicas, seed=seed)

    def subset(self, selection: ArrayLike | slice) -> Self:
        """Return the samples that a slice, indices or a boolean mask ``(S,)`` select, in that order."""
        indices = np.arange(len(self))[selection if isinstance(selection, slice) else np.asarray(selection)]
        return replace(
            self,
            positions=self.positions[indices],
            log_weights=self.log_weights[indices],
            reduced_potentials={name: u[indices] for name, u in self.reduced_potentials.items()},
        )

    def resample(self, number: int, seed: int) -> Self:
        """Return ``number`` equally weighted samples, by systematic resampling.

        Each sample appears ``number * weight`` times, rounded up or down, and unbiased on average; copies of
        one sample stand next to each other, so that block errors still see them as one. The copies are
        counted as samples by :meth:`effective_sample_size`: quote the one of the weighted samples.

        Args:
            number: how many to return, at least one.
            seed: of the one random number that is drawn.
        """
        if number < 1:
            raise ValueError(f"cannot resample to {number} samples")
        cumulative = np.cumsum(self.weights)
        points = (np.arange(number) + np.random.default_rng(seed).random()) / number
        # Divided by its own last entry, the sum ends on exactly one, and every point falls below it.
        indices = np.searchsorted(cumulative / cumulative[-1], points, side="right")
        history = {"resampled": {"seed": seed, "samples": len(self), "ess": self.effective_sample_size()}}
        return replace(self.subset(indices), log_weights=np.zeros(number), provenance={**self.provenance, **history})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return all samples of several sets in one.

        The sets must share particles, temperature and the names of their reduced potentials, and their
        weights must share their constant: each is ``u_generator - u_target`` with normalised densities of the
        generators. Where both reduced potentials are there, this is checked.

        Raises:
            ValueError: when there is nothing to join, or the sets do not belong together.
            MoleculeMismatchError: when their particles differ.
        """
        if not parts:
            raise ValueError("no samples to concatenate")
        first = parts[0]
        for index, part in enumerate(parts[1:], start=1):
            if part.particles != first.particles:
                raise MoleculeMismatchError(f"samples {index} are of other particles than samples 0")
            if part.temperature != first.temperature:
                raise ValueError(f"samples {index} are at {part.temperature} K, samples 0 at {first.temperature} K")
            if set(part.reduced_potentials) != set(first.reduced_potentials):
                raise ValueError(
                    f"samples {index} have reduced potentials {sorted(part.reduced_potentials)}, samples 0 "
                    f"have {sorted(first.reduced_potentials)}"
                )
        _refuse_different_constants(parts)
        same = all(part.provenance == first.provenance for part in parts)
        return cls(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.log_weights for part in parts]),
            first.particles,
            first.temperature,
            {
                name: np.concatenate([part.reduced_potentials[name] for part in parts])
                for name in first.reduced_potentials
            },
            first.provenance if same else {"concatenated": [dict(part.provenance) for part in parts]},
        )

    def save(self, path: str | Path, *, single_precision: bool = False) -> None:
        """Write an HDF5 file that mdtraj opens as a trajectory and :meth:`load` reads back exactly.

        The file is written next to its final place and moved there when complete.

        Args:
            path: of the file; the ending ``.h5`` lets ``mdtraj.load`` recognise it.
            single_precision: keep float32 positions only, as mdtraj does. Otherwise float64 positions are
                stored besides, which triples the size. Weights and reduced potentials are float64 in any
                case.
        """
        single = replace(self, positions=self.positions.astype(np.float32)) if single_precision else self
        write_samples(single, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: when there is no such file.
            SampleFileError: when it is truncated, altered, foreign, or of a newer format.
        """
        return cls(**read_samples(Path(path)))

    def to_mdtraj(self) -> Any:
        """Return the configurations as an ``mdtraj.Trajectory`` (float32, without the weights)."""
        return _export("mdtraj")(self)

    def to_openmm_positions(self, index: int) -> Any:
        """Return one configuration ``(N, 3)`` as an ``openmm.unit.Quantity`` for a Context."""
        return _export("openmm")(self, index)

    def to_ase(self, selection: ArrayLike | slice | None = None) -> list[Any]:
        """Return ``ase.Atoms``, one a configuration, for all samples or those that ``selection`` picks."""
        atoms: list[Any] = _export("ase")(self if selection is None else self.subset(selection))
        return atoms

    def to_pandas(self, observables: Mapping[str, ArrayLike] | None = None) -> Any:
        """Return a ``pandas.DataFrame`` of weights, reduced potentials and observables, a row a sample."""
        return _export("pandas")(self, observables or {})


def _checked_reduced_potential(values: ArrayLike, name: str, needed: np.ndarray[Any, np.dtype[np.bool_]]) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != needed.shape:
        raise ValueError(f"reduced potential {name!r} must be of shape {needed.shape}, got {array.shape}")
    bad = needed & (np.isnan(array) | (array == -np.inf))
    if bad.any():
        raise NonFiniteEnergyError(
            f"reduced potential {name!r} is NaN or -inf for {int(bad.sum())} of {bad.size} samples, "
            f"the first at index {int(np.argmax(bad))}: evaluate them again, or give them weight -inf"
        )
    return array


def _refuse_different_constants(parts: Sequence[WeightedSamples]) -> None:
    """Refuse sets whose weights are ``u_generator - u_target`` plus different constants, or only some are."""
    if not {"target", "generator"} <= set(parts[0].reduced_potentials):
        return
    constants = []
    for part in parts:
        # Samples of negligible weight can have energies so large that their rounding hides the constant.
        held = part.log_weights > part.log_weights.max() - 30.0
        target, generator = (part.reduced_potentials[name][held] for name in ("target", "generator"))
        excess = part.log_weights[held] + target - generator
        constants.append((float(excess.min()), float(excess.max())))
    plain = [high - low < 1e-3 for low, high in constants]
    if not any(plain):
        return
    middle = [0.5 * (low + high) for low, high in constants]
    if not all(plain) or max(middle) - min(middle) > 1e-3:
        raise ValueError(
            "the weights of these samples are not on one scale: log w - (u_generator - u_target) is about "
            f"{', '.join(f'{m:.4g}' for m in middle)}. Make them with flowbridge.core.reweighting.reweight, then join them"
        )


def _export(name: str) -> Callable[..., Any]:
    for entry in entry_points(group="flowbridge.sample_exports", name=name):
        function: Callable[..., Any] = entry.load()
        return function
    raise ConfigurationError(
        f"no export of samples to {name} is registered: the installed flowbridge is older than its source, "
        "install it again"
    )
