"""Checks of a generator: its samples are of the density that it gives, and their weights are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..core.generator import Generator
from ..core.reweighting import Draws, reweight
from .report import Check, ConformanceReport, outcome

_SIGMAS = 5.0  # of the mean weight: one run in a million fails by chance


def check_generator(
    generator: Generator,
    *,
    target: Any = None,
    log_partition: float | None = None,
    count: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ConformanceReport:
    """Run every conformance check on a generator, and return the report if all is well.

    Checked are shapes and types, the log-densities of samples against ``log_prob``, seeds, and the mean weight of samples
    towards a target whose partition function is known. Run :func:`~flowbridge.testing.check_potential` as well where the
    generator is a potential.

    Args:
        generator: on the CPU.
        target: anything :func:`~flowbridge.core.energy.as_batched_energy` takes, near enough to the generator that the mean
            weight converges.
        log_partition: ``log Z``, the logarithm of the integral of ``exp(-U/kT)`` over what the density is over.
        count: number of samples.
        tolerance: of log-densities, relative to the largest one; a flow that integrates an equation needs more.
        seed: random seed.

    Raises:
        ConformanceError: with one line for each check that failed.
    """
    report = examine_generator(
        generator, target=target, log_partition=log_partition, count=count, tolerance=tolerance, seed=seed
    )
    report.require()
    return report


def examine_generator(
    generator: Generator,
    *,
    target: Any = None,
    log_partition: float | None = None,
    count: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> ConformanceReport:
    """Return what :func:`check_generator` finds, without raising an error for what fails; arguments as there."""

    def drawn(number: int = seed) -> Draws:
        with torch.no_grad():
            return generator.sample_positions(count, torch.Generator().manual_seed(number))

    checks: tuple[tuple[str, Callable[[str], Check]], ...] = (
        ("shapes and types", lambda name: _shapes(name, generator, drawn(), count)),
        ("samples have the density of log_prob", lambda name: _density(name, generator, drawn(), tolerance)),
        ("seeds", lambda name: _seeds(name, drawn(), drawn(), drawn(seed + 1))),
        ("global random state", lambda name: _global_state(name, drawn)),
        ("mean weight", lambda name: _mean_weight(name, generator, drawn(), target, log_partition)),
    )
    return ConformanceReport(type(generator).__name__, tuple(outcome(name, function) for name, function in checks))


def _shapes(name: str, generator: Generator, draws: Draws, count: int) -> Check:
    """Positions ``(S, N, 3)`` and log-densities ``(S,)``, float64, of samples and from ``log_prob``."""
    expected = (count, len(generator.metadata.particles), 3)
    problems = []
    if tuple(draws.positions.shape) != expected:
        problems.append(f"positions have the shape {tuple(draws.positions.shape)}, expected {expected}")
    for what, tensor in (("log-densities", draws.log_prob), ("log_prob", generator.log_prob(draws.positions))):
        if tuple(tensor.shape) != (count,):
            problems.append(f"{what} has the shape {tuple(tensor.shape)}, expected {(count,)}")
        elif tensor.dtype != torch.float64:
            problems.append(f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected float64")
    return Check(name, not problems, detail="; ".join(problems))


def _density(name: str, generator: Generator, draws: Draws, tolerance: float) -> Check:
    """The log-density that comes with a sample is that of ``log_prob`` there; what is no configuration has none."""
    usable = torch.isfinite(draws.log_prob)
    with torch.no_grad():
        difference = (generator.log_prob(draws.positions[usable]) - draws.log_prob[usable]).abs()
    if not len(difference):
        return Check(name, False, detail="no sample has a finite log-density")
    measured, allowed = float(difference.max()), tolerance * max(float(draws.log_prob[usable].abs().max()), 1.0)
    return Check(name, measured <= allowed, measured, allowed, "nats")


def _seeds(name: str, first: Draws, again: Draws, other: Draws) -> Check:
    """One seed gives the same bits twice, another one other samples."""
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        return Check(
            name, False, detail="the same seed gives other samples: is all randomness from the given generator?"
        )
    if torch.equal(first.positions, other.positions):
        return Check(name, False, detail="another seed gives the same samples")
    return Check(name, True)


def _global_state(name: str, drawn: Callable[[], Draws]) -> Check:
    """Drawing uses no random numbers but those of its generator."""
    before = torch.get_rng_state().clone(), repr(np.random.get_state())  # noqa: NPY002
    drawn()
    if torch.equal(before[0], torch.get_rng_state()) and before[1] == repr(np.random.get_state()):  # noqa: NPY002
        return Check(name, True)
    return Check(name, False, detail="drawing changes the global random state of torch or numpy")


def _mean_weight(name: str, generator: Generator, draws: Draws, target: Any, log_partition: float | None) -> Check:
    """The mean of ``exp(-U/kT) / p`` is the partition function of the target."""
    temperature = generator.metadata.temperature
    if target is None or log_partition is None or temperature is None:
        return Check(name, None, detail="needs a target, its log_partition, and a generator with a temperature")
    samples = reweight(draws, target, generator.metadata.particles, temperature)
    weights = np.exp(samples.log_weights - log_partition)
    measured = abs(float(weights.mean()) - 1.0)
    # Weights that are all equal have no scatter but that of rounding.
    allowed = _SIGMAS * float(weights.std()) / float(np.sqrt(len(weights))) + 1e-6
    detail = f"relative to the partition function, {samples.effective_sample_percent():.0f} % effective"
    return Check(name, measured <= allowed, measured, allowed, detail)
