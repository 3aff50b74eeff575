"""Energies with forces, log-probabilities and samples of a flow, per configuration: ``python -m benchmarks.flow_throughput``.

All flows have the same number of parameters and act on the same coordinates of alanine dipeptide.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import flowbridge
from flowbridge.core.compilation.building import accelerated
from flowbridge.core.energy import COMPILED_BATCH
from flowbridge.core.potential import Potential
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.position_sampler import PositionSampler

from .external_flows import ExternalFlow, external_flows, parameter_count
from .harness import Timing, arguments, paired, ratio, report
from .molecules import FLOW, alanine_flow, alanine_frames, multiply_adds

_BATCHES = (1, 100, 1000, 10_000)
Cases = dict[str, Callable[[], object]]
Programs = dict[int, Potential]


def energy_cases(flow: BoltzmannGenerator, others: dict[str, ExternalFlow], batch: int, programs: Programs) -> Cases:
    """Return what computes energies and forces of a batch."""
    frames = alanine_frames()
    positions = torch.as_tensor(frames[torch.arange(batch).numpy() % len(frames)])
    program = programs[min(batch, COMPILED_BATCH)]
    cases: Cases = {"compiled": lambda: program.energy_and_forces(positions)}
    for name, potential in {"torch": flow, **others}.items():
        cases[name] = lambda potential=potential: potential.energy_and_forces(positions)
    return cases


def density_cases(flow: BoltzmannGenerator, others: dict[str, ExternalFlow], batch: int, programs: Programs) -> Cases:
    """Return what computes log-probabilities of a batch; the compiled program has forces too."""
    frames = alanine_frames()
    positions = torch.as_tensor(frames[torch.arange(batch).numpy() % len(frames)])
    program = programs[min(batch, COMPILED_BATCH)]
    assert flow.metadata.temperature is not None
    scale = -1.0 / thermal_energy(flow.metadata.temperature)
    cases: Cases = {"compiled": lambda: scale * program.energy_and_forces(positions).energy}
    for name, potential in {"torch": flow, **others}.items():

        def density(potential: BoltzmannGenerator | ExternalFlow = potential) -> object:
            with torch.no_grad():
                return potential.log_prob(positions)

        cases[name] = density
    return cases


def sample_cases(flow: BoltzmannGenerator, others: dict[str, ExternalFlow], batch: int, programs: Programs) -> Cases:
    """Return what draws a batch of positions (ours with their log-densities)."""
    generator = torch.Generator().manual_seed(1)
    sampler = _sampler(flow, min(batch, 1000))
    cases: Cases = {
        "compiled": lambda: sampler(batch, generator),
        "torch": lambda: flow.sample_positions(batch, generator),
    }
    for name, potential in others.items():
        cases[name] = lambda potential=potential: potential.sample_positions(batch)
    return cases


@cache
def _sampler(flow: BoltzmannGenerator, batch: int) -> PositionSampler:
    return PositionSampler(flow, batch, "always")


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(threads=2, rounds=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)
    flow = alanine_flow(FLOW)
    others = external_flows(flow)
    file = Path(tempfile.mkdtemp(prefix="flowbridge-benchmark-")) / "alanine.flow"
    digest = flowbridge.save(flow, file)
    programs: Programs = {
        batch: accelerated(flow, mode="always", digest=digest, batch=batch) for batch in (1, COMPILED_BATCH)
    }
    results: dict[str, Any] = {
        "multiply_adds": multiply_adds(flow),
        "parameters": {"flowbridge": parameter_count(flow.flow)}
        | {name: parameter_count(other.flow) for name, other in others.items()},
    }
    rows: list[tuple[str, ...]] = []
    kinds = {"energies and forces": energy_cases, "log-probabilities": density_cases, "samples": sample_cases}
    for kind, make in kinds.items():
        results[kind] = {}
        table: dict[str, dict[int, Timing]] = {}
        for batch in _BATCHES:
            cases = make(flow, others, batch, programs)
            timings = paired(cases, work=dict.fromkeys(cases, float(batch)), rounds=options.rounds)
            best = timings["compiled"]
            fastest = min((timings[name] for name in others), key=lambda one: one.median)
            results[kind][str(batch)] = {
                "over_fastest_library": ratio(fastest, best),
                "microseconds_per_configuration": {name: one.median for name, one in timings.items()},
                "rounds": {name: one.rounds for name, one in timings.items()},
            }
            for name, one in timings.items():
                table.setdefault(name, {})[batch] = one
        rows.append((kind, *("" for _ in _BATCHES)))
        rows += [(f"  {name}", *(f"{one.median:.1f}" for one in line.values())) for name, line in table.items()]
        advantages = [results[kind][str(batch)]["over_fastest_library"] for batch in _BATCHES]
        rows.append(("  fastest library over ours", *(f"{value:.1f}" for value in advantages)))
    columns = ("microseconds a configuration", *(f"batch {batch}" for batch in _BATCHES))
    report("flow_throughput", "alanine dipeptide: flows in batches", columns, rows, results)


if __name__ == "__main__":
    main()
