"""Energies and forces of many configurations of one System, per second: ``python -m benchmarks.openmm_energies``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
from flowbridge.integrations.openmm.energies import OpenMMEnergy
from numpy.typing import NDArray
from openmm import app, unit

from .harness import arguments, paired, ratio, report
from .molecules import alanine_frames, alanine_topology

_COUNT = 2000
_FORCE_FIELDS = {
    "GBSAOBC (OBC2)": ("amber96.xml", "amber96_obc.xml"),
    "CustomGB (OBC1)": ("amber96.xml", "implicit/obc1.xml"),
    "vacuum": ("amber96.xml",),
}


def plain_loop(system: openmm.System, positions: NDArray[np.float64]) -> Callable[[], object]:
    """Return what a script does that follows the manual: one Context, quantities with units, lists of Vec3."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))

    def run() -> object:
        energies, forces = [], []
        for frame in positions:
            context.setPositions(frame * unit.nanometer)
            state = context.getState(getEnergy=True, getForces=True)
            energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
            forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
        return np.array(energies), np.array(forces)

    return run


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Contexts, one a thread")
    options = parser.parse_args()
    topology, _ = alanine_topology()
    frames = alanine_frames()
    positions = np.ascontiguousarray(frames[np.arange(_COUNT) % len(frames)])
    results: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name, files in _FORCE_FIELDS.items():
        system = app.ForceField(*files).createSystem(topology)
        evaluators = {
            f"{platform}, {workers} thread{'s' if workers > 1 else ''}": OpenMMEnergy(system, platform, workers)
            for platform in ("Reference", "CPU")
            for workers in sorted({1, options.workers})
        }
        cases: dict[str, Callable[[], object]] = {"plain loop with units": plain_loop(system, positions)}
        for label, evaluator in evaluators.items():
            cases[label] = lambda evaluator=evaluator: evaluator.energies_and_forces(positions)
        chosen = OpenMMEnergy(system)
        cases["OpenMMEnergy as it comes"] = lambda chosen=chosen: chosen.energies_and_forces(positions)
        timings = paired(cases, work=dict.fromkeys(cases, float(_COUNT)), rounds=options.rounds)
        single = min((one for label, one in timings.items() if label.endswith("1 thread")), key=lambda one: one.median)
        best = timings["OpenMMEnergy as it comes"]
        results[name] = {
            "parallel_speedup": ratio(single, best),
            "over_plain_loop": ratio(timings["plain loop with units"], best),
            "configurations_per_second": {label: 1e6 / one.median for label, one in timings.items()},
            "rounds": {label: one.rounds for label, one in timings.items()},
        }
        rows.append((name, "", ""))
        rows += [(f"  {label}", f"{1e6 / one.median:.0f}", f"{ratio(one, best):.2f}") for label, one in timings.items()]
    columns = ("case", "configurations/s", "time over OpenMMEnergy")
    report("openmm_energies", "alanine dipeptide, Amber ff96: energies and forces", columns, rows, results)
    for name, values in results.items():
        print(
            f"{name}: parallel_speedup {values['parallel_speedup']:.2f}, over_plain_loop {values['over_plain_loop']:.2f}"
        )


if __name__ == "__main__":
    main()
