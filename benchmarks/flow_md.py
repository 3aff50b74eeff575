"""Microseconds per step of flow-driven molecular dynamics, in OpenMM and ASE: ``python -m benchmarks.flow_md``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import ase
import openmm
import torch
from ase import units
from ase.md.verlet import VelocityVerlet
from flowbridge.calculators import PotentialCalculator
from flowbridge.core.compilation.compiled_potential import compiled
from flowbridge.core.potential import Potential
from flowbridge.integrations.openmm import add_potential, particle_system

import flowbridge

from .floor import matrix_vector_chain
from .foreign_flows import foreign_flows, parameter_count
from .harness import arguments, paired, ratio, report
from .molecules import alanine_flow, alanine_frames, multiply_adds


def openmm_steps(potential: Potential | Path, steps: int, compilation: str = "never") -> Callable[[], object]:
    """Return a call that makes ``steps`` steps of Langevin dynamics on the Reference platform."""
    system = particle_system(potential)
    add_potential(system, potential, compilation=compilation)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
    integrator.setRandomNumberSeed(1)
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
    particles = calculator.potential.facts.particles
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


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    flow = alanine_flow()
    folder = Path(tempfile.mkdtemp(prefix="flowbridge-benchmark-"))
    flowbridge.save(flow, folder / "alanine.flow", created=None)
    program = compiled(flow)
    assert program is not None
    positions = torch.as_tensor(alanine_frames()[:1])
    foreign = foreign_flows(flow)
    import warnings

    warnings.simplefilter("ignore", UserWarning)  # the flows of other libraries are in no model file
    cases: dict[str, Callable[[], object]] = {
        "floor: multiply-adds in C": matrix_vector_chain(flow.flow),
        "bare compiled call": lambda: program.run([positions]),
        "compiled, as a Potential": lambda: program.energy_and_forces(positions),
        "compiled, OpenMM step": openmm_steps(folder / "alanine.flow", 200, "always"),
        "compiled, ASE step": ase_steps(folder / "alanine.flow", 200, "always"),
        "eager call": lambda: flow.energy_and_forces(positions),
        "eager, OpenMM step": openmm_steps(flow, 10),
        "eager, ASE step": ase_steps(folder / "alanine.flow", 10, "never"),
    }
    work = {name: 200.0 for name in cases if name.startswith("compiled,") and name.endswith("step")}
    work |= {name: 10.0 for name in cases if name.startswith("eager,")}
    for name, potential in foreign.items():
        cases[f"{name}, OpenMM step"] = openmm_steps(potential, 5)
        work[f"{name}, OpenMM step"] = 5.0
    timings = paired(cases, work=work, rounds=options.rounds)
    bare = timings["bare compiled call"]
    results = {
        "multiply_adds": multiply_adds(flow),
        "parameters": {"flowbridge": parameter_count(flow.flow)}
        | {n: parameter_count(p.flow) for n, p in foreign.items()},
        "step_over_bare": ratio(timings["compiled, OpenMM step"], bare),
        "ase_step_over_bare": ratio(timings["compiled, ASE step"], bare),
        "eager_over_compiled": ratio(timings["eager call"], bare),
        "eager_step_over_compiled_step": ratio(timings["eager, OpenMM step"], timings["compiled, OpenMM step"]),
        "bare_over_floor": ratio(bare, timings["floor: multiply-adds in C"]),
        "microseconds": {name: timing.median for name, timing in timings.items()},
        "rounds": {name: timing.rounds for name, timing in timings.items()},
    }
    for name in foreign:
        results[f"{name}_over_compiled_step"] = ratio(timings[f"{name}, OpenMM step"], timings["compiled, OpenMM step"])
    rows = [
        (name, f"{timing.median:.1f}", f"{ratio(timing, bare):.2f}") for name, timing in timings.items()
    ]  # fmt: skip
    report(
        "flow_md", "energy and forces of one alanine dipeptide, one MD step", ("case", "µs", "over bare"), rows, results
    )
    for key in ("step_over_bare", "ase_step_over_bare", "eager_over_compiled", "bare_over_floor"):
        print(f"{key}: {results[key]:.2f}")


if __name__ == "__main__":
    main()
