"""pymbar: free energies between ensembles (states), refused where the samples do not support them.

All energies here are reduced (U/kT, or -log q of a learned density) and all free energies are in kT.

MBAR (M. Shirts, J. Chodera, J. Chem. Phys. 129, 124105, 2008) gives a number for any input, and pymbar does not object
where that number is meaningless for lack of common configurations. Every function here checks the overlap matrix
(P. Klimovich, M. Shirts, D. Mobley, J. Comput. Aided Mol. Des. 29, 397, 2015) and the distance of the solution from the
minimum, and raises an error instead.

Import it as ``flowbridge.integrations.pymbar``; inside, ``import pymbar`` is the package itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logsumexp

from ..core.errors import ConvergenceError, MoleculeMismatchError, NonFiniteEnergyError, OverlapError
from ..core.samples import WeightedSamples
from ..core.statistics.bennett import MINIMUM_OVERLAP, weighted_acceptance_ratio
from ..core.statistics.bootstrap import DEFAULT_REPLICAS, Estimate, FloatArray

# pymbar logs a banner about JAX and a general warning on import; neither is about the user's data.
_logger = logging.getLogger("pymbar")
_level = _logger.level
_logger.setLevel(logging.ERROR)
import pymbar  # noqa: E402
from pymbar import timeseries  # noqa: E402
from pymbar.mbar_solvers import ROBUST_SOLVER_PROTOCOL  # noqa: E402

_logger.setLevel(_level)

MINIMUM_EFFECTIVE_SAMPLES = 50.0
CONVERGENCE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MbarResult:
    """Free energies of K states.

    Attributes:
        states: names.
        free_energies: ``(K, K)``; element (i, j) is ``F_j - F_i`` in kT.
        errors: standard errors ``(K, K)`` of the free energies.
        overlap: overlap matrix ``(K, K)``; rows sum to one, columns of states without samples are zero.
        counts: number ``(K,)`` of samples used from each state.
        effective_samples: effective number ``(K,)`` of samples of each state among all used.
    """

    states: tuple[str, ...]
    free_energies: FloatArray
    errors: FloatArray
    overlap: FloatArray
    counts: np.ndarray[Any, np.dtype[np.int64]]
    effective_samples: FloatArray

    def difference(self, state_a: str, state_b: str) -> Estimate[float]:
        """Return ``F_b - F_a`` in kT with its standard error."""
        i, j = (_index(self.states, state) for state in (state_a, state_b))
        return Estimate(float(self.free_energies[i, j]), float(self.errors[i, j]))


def _index(states: Sequence[str], state: str) -> int:
    if state not in states:
        raise ValueError(f"no state {state!r}, there are {list(states)}")
    return states.index(state)


def mbar_from_reduced_potentials(
    reduced_potentials: ArrayLike,
    counts: ArrayLike,
    states: Sequence[str] | None = None,
    *,
    minimum_overlap: float = MINIMUM_OVERLAP,
    minimum_effective_samples: float = MINIMUM_EFFECTIVE_SAMPLES,
    maximum_iterations: int = 10_000,
) -> MbarResult:
    """Return free energies of K states from independent samples of some of them.

    Args:
        reduced_potentials: reduced potentials ``(K, N)`` of every sample in every state, ``+inf`` where a sample is
            impossible; samples in the order of the states.
        counts: number ``(K,)`` of samples from each state; zero for states that were not sampled.
        states: K names for messages and the result; numbers where None.
        minimum_overlap: smallest element of the overlap matrix, the larger of two, that connects a pair of sampled
            states; all states must be connected, directly or through others.
        minimum_effective_samples: smallest effective number of samples of a state without samples of its own.
        maximum_iterations: largest number of iterations of pymbar's robust solvers.

    Raises:
        OverlapError: when the states do not overlap; the message has the numbers.
        ConvergenceError: when the solver stopped short of the solution, or gives no error.
        NonFiniteEnergyError: when a reduced potential is NaN or ``-inf``, or ``+inf`` in a sample's own
            state.
    """
    energies, numbers, names = _checked_problem(reduced_potentials, counts, states)
    # Only differences between states matter; large common energies would cost digits.
    energies = energies - energies.min(axis=0)
    with np.errstate(all="ignore"):
        mbar = _solve(energies, numbers, maximum_iterations)
        weights = np.asarray(mbar.W_nk, dtype=np.float64)
        overlap = (weights.T @ weights) * numbers
        _require_connection(overlap, numbers, names, minimum_overlap)
        effective = weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)
        for name, count, size in zip(names, numbers, effective, strict=True):
            # A state without any support makes its weights NaN.
            if count == 0 and not size >= minimum_effective_samples:
                raise OverlapError(
                    f"state {name!r} was not sampled, and the samples of the others amount to {size:.3g} "
                    f"effective samples of it (needed: {minimum_effective_samples:g}). "
                    "Sample it, or states in between"
                )
        distance = distance_to_solution(energies, numbers, np.asarray(mbar.f_k, dtype=np.float64))
        if not distance <= CONVERGENCE_TOLERANCE:
            raise ConvergenceError(
                f"MBAR stopped about {distance:.2g} kT from its solution (allowed: {CONVERGENCE_TOLERANCE:g}): "
                "give it more iterations, or look for states that hardly overlap"
            )
        result = mbar.compute_free_energy_differences()
    errors = np.asarray(result["dDelta_f"], dtype=np.float64)
    if not np.isfinite(errors).all():
        raise ConvergenceError(f"pymbar could not compute errors for the states {list(names)}: got {errors}")
    free_energies = np.asarray(result["Delta_f"], dtype=np.float64)
    return MbarResult(names, free_energies, errors, overlap, numbers, effective)


def _solve(energies: FloatArray, counts: np.ndarray[Any, np.dtype[np.int64]], maximum_iterations: int) -> pymbar.MBAR:
    """Run pymbar with its robust solvers, without its side effects.

    pymbar writes the iteration limit into its own table of solvers, where it can only grow, and reseeds NumPy's global
    random numbers, which would change a user's script.
    """
    protocol = deepcopy(ROBUST_SOLVER_PROTOCOL)
    for solver in protocol:
        solver["options"]["maxiter"] = maximum_iterations
    state = np.random.get_state()  # noqa: NPY002
    try:
        return pymbar.MBAR(energies, counts, solver_protocol=protocol, maximum_iterations=maximum_iterations)
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _checked_problem(
    reduced_potentials: ArrayLike, counts: ArrayLike, states: Sequence[str] | None
) -> tuple[FloatArray, np.ndarray[Any, np.dtype[np.int64]], tuple[str, ...]]:
    energies = np.asarray(reduced_potentials, dtype=np.float64)
    numbers = np.asarray(counts, dtype=np.int64)
    if energies.ndim != 2 or energies.size == 0 or numbers.shape != (len(energies),):
        raise ValueError(f"need reduced potentials (K, N) and K counts, got {energies.shape} and {numbers.shape}")
    names = tuple(states) if states is not None else tuple(str(k) for k in range(len(energies)))
    if len(names) != len(energies) or len(set(names)) != len(names):
        raise ValueError(f"need {len(energies)} different names of states, got {list(names)}")
    if (numbers < 0).any() or numbers.sum() != energies.shape[1]:
        raise ValueError(f"counts {numbers.tolist()} do not add up to the {energies.shape[1]} samples")
    bad = np.isnan(energies) | (energies == -np.inf)
    own = np.repeat(np.arange(len(numbers)), numbers)
    bad[own, np.arange(energies.shape[1])] |= ~np.isfinite(energies[own, np.arange(energies.shape[1])])
    if bad.any():
        state, sample = np.argwhere(bad)[0]
        raise NonFiniteEnergyError(
            f"{int(bad.sum())} reduced potentials are NaN or -inf, or +inf in the sample's own state; "
            f"the first is {energies[state, sample]} for sample {sample} in state {names[state]!r}. "
            "Evaluate them again, or set +inf in states where a configuration is impossible"
        )
    return energies, numbers, names


def _require_connection(
    overlap: FloatArray, counts: np.ndarray[Any, np.dtype[np.int64]], names: Sequence[str], minimum: float
) -> None:
    """Refuse sampled states that fall into groups without overlap."""
    sampled = np.flatnonzero(counts)
    pair = np.maximum(overlap, overlap.T)
    group = {int(sampled[0])}
    while grown := {int(j) for j in sampled if j not in group and pair[list(group), j].max() >= minimum}:
        group |= grown
    others = [int(j) for j in sampled if j not in group]
    if others:
        inside = sorted(group)
        best = np.unravel_index(np.argmax(pair[np.ix_(inside, others)]), (len(inside), len(others)))
        i, j = inside[int(best[0])], others[int(best[1])]
        raise OverlapError(
            f"the states {[names[k] for k in inside]} do not overlap with {[names[k] for k in others]}: the "
            f"best pair, {names[i]!r} and {names[j]!r}, has {overlap[i, j]:.2g} and {overlap[j, i]:.2g} "
            f"in the overlap matrix (needed: {minimum:g}). Sample states in between, or draw more samples"
        )


def distance_to_solution(
    reduced_potentials: FloatArray, counts: np.ndarray[Any, np.dtype[np.int64]], free_energies: FloatArray
) -> float:
    """Return the largest element of the Newton step from free energies to the MBAR solution, in kT.

    Unlike the residual of the self-consistent equations, which is small wherever convergence is slow, the
    step estimates the error of the free energies.

    Args:
        reduced_potentials: reduced potentials ``(K, N)``.
        counts: number ``(K,)`` of samples from each state.
        free_energies: free energies ``(K,)`` of all states; only those of sampled states matter.
    """
    sampled = np.flatnonzero(counts)
    logits = free_energies[sampled, None] - reduced_potentials[sampled] + np.log(counts[sampled])[:, None]
    shares = np.exp(logits - logsumexp(logits, axis=0))
    gradient = counts[sampled] - shares.sum(axis=1)
    hessian = np.diag(shares.sum(axis=1)) - shares @ shares.T
    # The common constant is arbitrary: the first state is fixed.
    if len(sampled) == 1:
        return 0.0
    step = np.linalg.lstsq(hessian[1:, 1:], gradient[1:], rcond=None)[0]
    return float(np.abs(step).max())


def mbar_from_samples(
    samples: Mapping[str, WeightedSamples],
    states: Sequence[str] | None = None,
    *,
    decorrelate: bool = True,
    minimum_overlap: float = MINIMUM_OVERLAP,
    minimum_effective_samples: float = MINIMUM_EFFECTIVE_SAMPLES,
) -> MbarResult:
    """Return free energies of states from samples of some of them, by their reduced potentials.

    Weights are ignored: each set counts as drawn from its named state. Samples of a Boltzmann generator and molecular
    dynamics of its target are ``{"generator": drawn, "target": trajectory}``.

    Args:
        samples: for each name of a reduced potential, the samples *drawn from* it.
        states: names of reduced potentials of every set; all common ones where None.
        decorrelate: whether to reduce each set to independent samples, by pymbar's statistical inefficiency; samples must
            then be in the order of time. It is harmless for independent samples.
        minimum_overlap: see :func:`mbar_from_reduced_potentials`.
        minimum_effective_samples: see :func:`mbar_from_reduced_potentials`.

    Raises:
        ValueError: when a reduced potential is missing, or a set cannot have been drawn from its state.
        OverlapError, ConvergenceError, NonFiniteEnergyError: see :func:`mbar_from_reduced_potentials`.
    """
    if not samples:
        raise ValueError("no samples: give the name of a reduced potential and samples drawn from it")
    common = set.intersection(*(set(part.reduced_potentials) for part in samples.values()))
    names = sorted(common) if states is None else list(states)
    _require_same_particles(list(samples.values()))
    for name in [*names, *samples]:
        if name not in common or name not in names:
            raise ValueError(
                f"state {name!r} must be among the reduced potentials of all sets ({sorted(common)}) and "
                f"among the states ({names})"
            )
    for name, part in samples.items():
        _require_drawn_from(part, name)
    columns, counts = [], []
    for name in names:
        if name not in samples:
            counts.append(0)
            continue
        energies = np.stack([samples[name].reduced_potentials[state] for state in names])
        if decorrelate:
            energies = energies[:, _independent(energies, names.index(name))]
        columns.append(energies)
        counts.append(energies.shape[1])
    return mbar_from_reduced_potentials(
        np.concatenate(columns, axis=1),
        counts,
        names,
        minimum_overlap=minimum_overlap,
        minimum_effective_samples=minimum_effective_samples,
    )


def _independent(energies: FloatArray, own: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return indices of independent samples, by the slowest energy difference to another state.

    The series are those of the estimator, Bennett's bounded function of the difference, so that a single clash or infinite
    energy does not hide the correlation of the rest.
    """
    inefficiency = 1.0
    for other in range(len(energies)):
        difference = energies[other] - energies[own]
        finite = difference[np.isfinite(difference)]
        if other == own or finite.size == 0:
            continue
        series = expit(np.median(finite) - difference)
        if np.ptp(series) > 0.0:
            inefficiency = max(inefficiency, float(timeseries.statistical_inefficiency(series)))
    return np.unique(np.floor(np.arange(0.0, energies.shape[1], inefficiency)).astype(np.int64))


def _require_same_particles(parts: Sequence[WeightedSamples]) -> None:
    for part in parts[1:]:
        if part.particles != parts[0].particles:
            raise MoleculeMismatchError("the sets of samples are of different particles")


def _weight_directions(samples: WeightedSamples) -> list[tuple[str, str]]:
    """Return the pairs (from, to) of states between which the log-weights reweight, up to a constant."""
    held = samples.log_weights > samples.log_weights.max() - 30.0
    found = []
    for origin, before in samples.reduced_potentials.items():
        for goal, after in samples.reduced_potentials.items():
            with np.errstate(invalid="ignore"):
                excess = samples.log_weights[held] - before[held] + after[held]
            if origin != goal and np.ptp(excess) < 1e-3:
                found.append((origin, goal))
    return found


def _uniform(samples: WeightedSamples) -> bool:
    return bool(np.ptp(samples.log_weights) == 0.0)


def _require_no_copies(samples: WeightedSamples) -> None:
    if "resampled" in samples.provenance:
        raise ValueError(
            "resampled configurations are copies of each other and would give errors far too small: give the "
            "weighted samples that they were made from"
        )


def _require_drawn_from(samples: WeightedSamples, state: str) -> None:
    _require_no_copies(samples)
    if not _uniform(samples) and state not in {origin for origin, _ in _weight_directions(samples)}:
        raise ValueError(
            f"samples given as drawn from {state!r} carry weights that do not lead from {state!r} to any of "
            f"their reduced potentials ({sorted(samples.reduced_potentials)}): name the state they come from"
        )


def free_energy_difference(
    samples_a: WeightedSamples,
    samples_b: WeightedSamples,
    state_a: str,
    state_b: str,
    *,
    minimum_overlap: float = MINIMUM_OVERLAP,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> Estimate[float]:
    """Return ``F_b - F_a`` in kT from samples of both states, by Bennett's acceptance ratio.

    Sets with equal weights are decorrelated and given to pymbar. A reweighted set goes to
    :func:`flowbridge.core.statistics.bennett.weighted_acceptance_ratio`, with a block bootstrap error.

    Args:
        samples_a: samples weighted to state a, with both reduced potentials.
        samples_b: the same for state b.
        state_a: name of the reduced potential of state a in both sets.
        state_b: name of the reduced potential of state b in both sets.
        minimum_overlap: see :func:`mbar_from_reduced_potentials`.
        blocks: number of blocks of consecutive samples for weighted sets; 100 where None.
        replicas: number of bootstrap replicas for weighted sets.
        seed: random seed of the bootstrap.

    Raises:
        ValueError: when a reduced potential is missing, or weights lead to another state than the one named.
        OverlapError, ConvergenceError, NonFiniteEnergyError: see :func:`mbar_from_reduced_potentials`.
    """
    if state_a == state_b:
        raise ValueError(f"both states are {state_a!r}")
    _require_same_particles([samples_a, samples_b])
    for samples, own in ((samples_a, state_a), (samples_b, state_b)):
        missing = {state_a, state_b} - set(samples.reduced_potentials)
        if missing:
            raise ValueError(f"samples of {own!r} have no reduced potential {sorted(missing)}")
        _require_no_copies(samples)
        goals = set() if _uniform(samples) else {goal for _, goal in _weight_directions(samples)}
        if goals and own not in goals:
            raise ValueError(f"the weights of the samples given for {own!r} lead to {sorted(goals)}")
    if _uniform(samples_a) and _uniform(samples_b):
        drawn = {state_a: samples_a, state_b: samples_b}
        result = mbar_from_samples(drawn, [state_a, state_b], minimum_overlap=minimum_overlap)
        return result.difference(state_a, state_b)
    with np.errstate(invalid="ignore"):
        gaps_a, gaps_b = (
            samples.reduced_potentials[state_b] - samples.reduced_potentials[state_a]
            for samples in (samples_a, samples_b)
        )
    return weighted_acceptance_ratio(
        gaps_a,
        gaps_b,
        samples_a.log_weights,
        samples_b.log_weights,
        minimum_overlap=minimum_overlap,
        blocks=blocks,
        replicas=replicas,
        seed=seed,
    )
