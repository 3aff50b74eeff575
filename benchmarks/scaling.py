"""Cost of a flow's energy and forces against the number of atoms and against the batch: ``python -m benchmarks.scaling``.

Alanine chains ACE-(ALA)n-NME with flows of one design: the networks grow with the coordinates that they see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flowbridge.core.compilation.building import compiled
from flowbridge.core.energy import COMPILED_BATCH
from flowbridge.integrations.openmm import OpenMMEnergy

from .floor import matrix_vector_chain
from .harness import arguments, paired, ratio, report
from .molecules import FLOW, alanine_chain, alanine_flow, alanine_frames, multiply_adds

_RESIDUES = (1, 2, 3, 5, 7, 10)
_BATCHES = (1, 10, 100, 1000, 10_000)


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Return the slope of a straight line through logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def against_atoms(rounds: int, largest: int) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """Time single configurations of chains."""
    rows, results = [], dict[str, Any]()
    for residues in (n for n in _RESIDUES if n <= largest):
        system, frames = alanine_chain(residues)
        flow = alanine_flow(FLOW, residues)
        program = compiled(flow)
        assert program is not None
        positions, force_field = torch.as_tensor(frames[:1]), OpenMMEnergy(system)
        cases: dict[str, Callable[[], object]] = {
            "floor": matrix_vector_chain(flow.flow),
            "compiled": lambda program=program, positions=positions: program.run([positions]),  # type: ignore[misc]
            "torch": lambda flow=flow, positions=positions: flow.energy_and_forces(positions),  # type: ignore[misc]
            "OBC force field": lambda energy=force_field, frames=frames: energy.energies_and_forces(frames[:1]),  # type: ignore[misc]
        }
        timings = paired(cases, rounds=rounds)
        results[str(residues)] = {
            "atoms": positions.shape[1],
            "multiply_adds": multiply_adds(flow),
            "eager_over_compiled": ratio(timings["torch"], timings["compiled"]),
            "compiled_over_floor": ratio(timings["compiled"], timings["floor"]),
            "microseconds": {name: one.median for name, one in timings.items()},
            "rounds": {name: one.rounds for name, one in timings.items()},
        }
        metadata = (str(residues), str(positions.shape[1]), str(multiply_adds(flow)))
        rows.append((*metadata, *(f"{one.median:.1f}" for one in timings.values())))
    return rows, results


def against_batch(rounds: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Time batches of alanine dipeptide."""
    flow, frames = alanine_flow(FLOW), alanine_frames()
    cases, work = {}, {}
    for batch in _BATCHES:
        program = compiled(flow, batch=1 if batch == 1 else COMPILED_BATCH)
        assert program is not None
        positions = torch.as_tensor(frames[np.arange(batch) % len(frames)])
        cases[str(batch)] = lambda program=program, positions=positions: program.energy_and_forces(positions)  # type: ignore[misc]
        work[str(batch)] = float(batch)
    timings = paired(cases, work=work, rounds=rounds)
    return tuple(f"{one.median:.1f}" for one in timings.values()), {
        name: {"microseconds_per_configuration": one.median, "rounds": one.rounds} for name, one in timings.items()
    }


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--residues", type=int, default=max(_RESIDUES), help="longest chain")
    parser.set_defaults(rounds=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, chains = against_atoms(options.rounds, options.residues)
    sizes = [float(chain["atoms"]) for chain in chains.values()]
    names = ("floor", "compiled", "torch", "OBC force field")
    exponents = (
        {name: exponent(sizes, [chain["microseconds"][name] for chain in chains.values()]) for name in names}
        if len(sizes) > 1
        else {}
    )
    if exponents:
        rows.append(("exponent in atoms", "", "", *(f"{value:.2f}" for value in exponents.values())))
    costs, batches = against_batch(options.rounds)
    rows.append(("", "", "", "", "", "", ""))
    rows += [(f"batch of {batch}", "22", "", "", cost, "", "") for batch, cost in zip(_BATCHES, costs, strict=True)]
    columns = ("residues", "atoms", "multiply-adds", "floor", "compiled", "torch", "force field")
    title = "alanine chains: microseconds for energy and forces of a configuration"
    report("scaling", title, columns, rows, {"chains": chains, "exponents": exponents, "batches": batches})


if __name__ == "__main__":
    main()
