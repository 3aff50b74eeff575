"""Energies and forces of many configurations of one System, per second: ``python -m benchmarks.openmm_energies``.

What two processes can do at most on a machine is measured as well: the same work in as many independent processes as there
are workers, each with a single Context and nothing to share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
from flowbridge.integrations.openmm.energies.plans import PlanConstraints

from .harness import arguments, paired, ratio, report
from .molecules import alanine_frames, alanine_topology, simulated

_COUNT = 2000
_WATER_COUNT = 40
_FORCE_FIELDS = {
    "GBSAOBC (OBC2)": ("amber96.xml", "amber96_obc.xml"),
    "CustomGB (OBC1)": ("amber96.xml", "implicit/obc1.xml"),
    "vacuum": ("amber96.xml",),
}

Positions = NDArray[np.float64]

# Evaluates a batch for every line that it reads, and says so.
_INDEPENDENT = """
import sys, numpy, openmm
from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
system = openmm.XmlSerializer.deserialize(open(sys.argv[1]).read())
positions = numpy.load(sys.argv[2])
energy = OpenMMEnergy(system, sys.argv[3], 1)
for line in sys.stdin:
    energy.evaluate(positions)
    print("done", flush=True)
"""


def plain_loop(system: openmm.System, positions: Positions, platform: str = "Reference") -> Callable[[], object]:
    """Return what a script does that follows the manual: one Context, quantities with units."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))

    def run() -> object:
        energies, forces = [], []
        for frame in positions:
            context.setPositions(frame * unit.nanometer)
            state = context.getState(getEnergy=True, getForces=True)
            energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
            forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
        return np.array(energies), np.array(forces)

    return run


def independent_processes(
    system: openmm.System, positions: Positions, platform: str, count: int
) -> Callable[[], object]:
    """Return a call after which each of ``count`` processes has evaluated all positions with a Context of its own."""
    folder = Path(tempfile.mkdtemp(prefix="flowbridge-benchmark-"))
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(folder / "positions.npy", positions)
    command = [sys.executable, "-c", _INDEPENDENT, str(folder / "system.xml"), str(folder / "positions.npy"), platform]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]

    def run() -> object:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return [process.stdout and process.stdout.readline() for process in processes]

    return run


def water_box() -> tuple[openmm.System, Positions]:
    """Return a System of about 895 waters with PME, and frames of its dynamics."""
    modeller = app.Modeller(app.Topology(), [])
    field = app.ForceField("tip3p.xml")
    modeller.addSolvent(field, boxSize=openmm.Vec3(3.0, 3.0, 3.0) * unit.nanometer)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
    return system, simulated(system, positions, _WATER_COUNT, platform="CPU")


def measured(system: openmm.System, positions: Positions, workers: int, rounds: int) -> dict[str, Any]:
    """Return configurations per second, ratios and rounds of one System."""
    count = len(positions)
    periodic = system.usesPeriodicBoundaryConditions()
    usual = "CPU" if periodic else "Reference"  # what a script would take; Reference does PME at three a second
    evaluators: dict[str, OpenMMEnergy] = {}
    for platform in (usual,) if periodic else ("Reference", "CPU"):
        evaluators[f"{platform}, 1 Context"] = OpenMMEnergy(system, platform, 1)
        for kind in ("threads", "processes"):
            evaluators[f"{platform}, {workers} {kind}"] = OpenMMEnergy(system, platform, workers, kind)  # type: ignore[arg-type]
    chosen = OpenMMEnergy(system, workers=None if workers == os.cpu_count() else workers)
    chosen.settle(positions[:200])
    assert chosen.plan is not None
    cases: dict[str, Callable[[], object]] = {f"plain loop, {usual}": plain_loop(system, positions, usual)}
    cases |= {label: (lambda one=one: one.evaluate(positions)) for label, one in evaluators.items()}
    cases["OpenMMEnergy as it comes"] = lambda: chosen.evaluate(positions)
    limit = f"{workers} independent, {chosen.plan.platform}"
    cases[limit] = independent_processes(system, positions, chosen.plan.platform, workers)
    work = dict.fromkeys(cases, float(count)) | {limit: float(count * workers)}
    timings = paired(cases, work=work, rounds=rounds)
    singles = [one for label, one in timings.items() if label.endswith("1 Context")]
    single = min(singles, key=lambda one: one.median)
    best = timings["OpenMMEnergy as it comes"]
    return {
        "plan": {"platform": chosen.plan.platform, "workers": chosen.plan.workers, "kind": chosen.plan.kind},
        "parallel_speedup": ratio(single, best),
        "speedup_of_independent_processes": ratio(single, timings[limit]),
        "over_plain_loop": ratio(timings[f"plain loop, {usual}"], best),
        "configurations_per_second": {label: 1e6 / one.median for label, one in timings.items()},
        "over_one_context": {label: ratio(single, one) for label, one in timings.items()},
        "rounds": {label: one.rounds for label, one in timings.items()},
    }


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Contexts at once")
    options = parser.parse_args()
    topology, _ = alanine_topology()
    frames = alanine_frames()
    positions = np.ascontiguousarray(frames[np.arange(_COUNT) % len(frames)])
    systems = {
        name: (app.ForceField(*files).createSystem(topology), positions) for name, files in _FORCE_FIELDS.items()
    }
    systems["water box (PME)"] = water_box()
    results: dict[str, Any] = {"platforms": PlanConstraints().platforms()}
    rows: list[tuple[str, ...]] = []
    for name, (system, configurations) in systems.items():
        one = results[name] = measured(system, configurations, options.workers, options.rounds)
        plan = one["plan"]
        rows.append((f"{name}: {plan['platform']}, {plan['workers']} {plan['kind']}", "", ""))
        for label, speed in one["configurations_per_second"].items():
            rows.append((f"  {label}", f"{speed:.0f}", f"{one['over_one_context'][label]:.2f}"))
    columns = ("case", "configurations/s", "over one Context")
    report("openmm_energies", "energies and forces of many configurations", columns, rows, results)
    for name in systems:
        keys = ("parallel_speedup", "speedup_of_independent_processes", "over_plain_loop")
        print(f"{name}: " + ", ".join(f"{key} {results[name][key]:.2f}" for key in keys))


if __name__ == "__main__":
    main()
