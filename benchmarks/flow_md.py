"""Microseconds per step of flow-driven molecular dynamics, in OpenMM and ASE: ``python -m benchmarks.flow_md``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import openmm
import torch
from ase import units
from ase.md.verlet import VelocityVerlet

import flowbridge
from flowbridge.calculators import PotentialCalculator
from flowbridge.core.compilation.building import compiled
from flowbridge.core.potential import Potential
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm import add_potential, particle_system

from .external_flows import external_flows, parameter_count
from .floor import matrix_vector_chain
from .harness import Timing, arguments, paired, ratio, report
from .molecules import FLOW, alanine_flow, alanine_frames, demo_flow, multiply_adds

_STEPS = 1000


def openmm_steps(potential: Potential | Path, steps: int, compilation: str = "never") -> Callable[[], object]:
    """Return a call that makes ``steps`` steps of Verlet dynamics on the Reference platform."""
    system = particle_system(potential)
    add_potential(system, potential, compilation=compilation)
    integrator = openmm.VerletIntegrator(1e-5)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    start = alanine_frames()[0]

    def run() -> object:
        # From the same point every time: the networks are untrained, and nothing holds the molecule together for long.
        context.setPositions(start)
        context.setVelocitiesToTemperature(1.0, 1)
        integrator.step(steps)
        return context

    return run


def ase_steps(file: Path, steps: int, compilation: str) -> Callable[[], object]:
    """Return a call that makes ``steps`` steps of velocity Verlet in ASE."""
    calculator = PotentialCalculator(file, compilation=compilation)
    particles = calculator.potential.metadata.particles
    start = alanine_frames()[0] * units.nm
    atoms = ase.Atoms(numbers=particles.atomic_numbers, masses=particles.masses, positions=start)
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, 0.01 * units.fs)

    def run() -> object:
        atoms.positions[:] = start
        atoms.set_momenta(0.0 * start)
        dynamics.run(steps)
        return atoms

    return run


def measured(flow: BoltzmannGenerator, rounds: int, external: bool) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Return the timings of one flow and the ratios that matter."""
    folder = Path(tempfile.mkdtemp(prefix="flowbridge-benchmark-"))
    file = folder / "alanine.flow"
    digest = flowbridge.save(flow, file)
    program = compiled(flow, digest=digest)
    assert program is not None
    positions = torch.as_tensor(alanine_frames()[:1])
    others = external_flows(flow) if external else {}
    cases: dict[str, Callable[[], object]] = {
        "floor: multiply-adds in C": matrix_vector_chain(flow.flow),
        "bare compiled call": lambda: program.run([positions]),
        "compiled, as a Potential": lambda: program.energy_and_forces(positions),
        "compiled, OpenMM step": openmm_steps(file, _STEPS, "always"),
        "compiled, ASE step": ase_steps(file, _STEPS, "always"),
        "torch, call": lambda: flow.energy_and_forces(positions),
        "torch, OpenMM step": openmm_steps(file, 10, "never"),
        "torch, ASE step": ase_steps(file, 10, "never"),
    }
    work = {name: float(_STEPS) for name in cases if name.startswith("compiled,") and name.endswith("step")}
    work |= {name: 10.0 for name in cases if name.startswith("torch,") and name.endswith("step")}
    for name, potential in others.items():
        cases[f"{name}, OpenMM step"] = openmm_steps(potential, 5)
        work[f"{name}, OpenMM step"] = 5.0
    timings = paired(cases, work=work, rounds=rounds)
    bare, step = timings["bare compiled call"], timings["compiled, OpenMM step"]
    results: dict[str, Any] = {
        "multiply_adds": multiply_adds(flow),
        "parameters": {
            "flowbridge": parameter_count(flow.flow),
            **{n: parameter_count(p.flow) for n, p in others.items()},
        },
        "step_over_bare": ratio(step, bare),
        "ase_step_over_bare": ratio(timings["compiled, ASE step"], bare),
        "eager_over_compiled": ratio(timings["torch, call"], bare),
        "eager_step_over_compiled_step": ratio(timings["torch, OpenMM step"], step),
        "bare_over_floor": ratio(bare, timings["floor: multiply-adds in C"]),
        **{f"{name}_step_over_compiled_step": ratio(timings[f"{name}, OpenMM step"], step) for name in others},
        "microseconds": {name: timing.median for name, timing in timings.items()},
        "rounds": {name: timing.rounds for name, timing in timings.items()},
    }
    return timings, results


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)  # the flows of other libraries are in no model file
    everything: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    flows = {"demo": demo_flow(), "small": FLOW}
    for name, configuration in flows.items():
        timings, results = measured(alanine_flow(configuration), options.rounds, external=name == "small")
        everything[name] = results
        rows.append((f"{name} flow, {results['multiply_adds']} multiply-adds", "", ""))
        bare = timings["bare compiled call"]
        rows += [(f"  {case}", f"{one.median:.1f}", f"{ratio(one, bare):.2f}") for case, one in timings.items()]
    report("flow_md", "alanine dipeptide: energy and forces, MD steps", ("case", "µs", "over bare"), rows, everything)
    for name, results in everything.items():
        keys = ("step_over_bare", "ase_step_over_bare", "eager_over_compiled", "bare_over_floor")
        print(f"{name}: " + ", ".join(f"{key} {results[key]:.2f}" for key in keys))


if __name__ == "__main__":
    main()
