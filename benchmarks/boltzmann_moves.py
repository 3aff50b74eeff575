"""Populations of alanine dipeptide's rare basins by Boltzmann generator moves against dynamics alone.

    python -m benchmarks.boltzmann_moves runs/alanine_dipeptide/alanine_dipeptide.flow

The population of phi > 0 is measured from a start at phi < 0, with moves between stretches of dynamics, and compared with the
reference of examples/alanine_reference.json. What dynamics alone would need follows from its rates: it leaves phi > 0 after a
mean time that is measured here from many starts, and enters it as often as detailed balance asks.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import app, unit

from flowbridge.integrations.openmm.sampling.boltzmann_moves import BoltzmannMover

from .harness import arguments, report
from .molecules import EXAMPLES, alanine_frames, alanine_system, alanine_topology

_TEMPERATURE, _STEP = 300.0, 0.001
_PHI = [4, 6, 8, 14]


def simulation(seed: int) -> app.Simulation:
    """Return alanine dipeptide in Amber ff96 with OBC implicit solvent, at phi < 0."""
    topology, _ = alanine_topology()
    integrator = openmm.LangevinMiddleIntegrator(_TEMPERATURE, 1.0, _STEP)
    integrator.setRandomNumberSeed(seed)
    made = app.Simulation(topology, alanine_system(), integrator, openmm.Platform.getPlatformByName("Reference"))
    made.context.setPositions(alanine_frames()[0])
    made.context.setVelocitiesToTemperature(_TEMPERATURE, seed)
    return made


def phi(context: openmm.Context) -> float:
    """Return the torsion phi in radians."""
    x = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    a, b, c = np.diff(x[_PHI], axis=0)
    first, second = np.cross(a, b), np.cross(b, c)
    return float(np.arctan2(np.cross(first, second) @ b / np.linalg.norm(b), first @ second))


def with_moves(model: Path, moves: int, interval: int, proposals: int, seed: int) -> dict[str, Any]:
    """Return the population of phi > 0, its error, the steps it took, and configurations at phi > 0."""
    made = simulation(seed)
    if phi(made.context) > 0:
        raise RuntimeError("the start is not at phi < 0")
    mover = BoltzmannMover(made, model, interval=interval, proposals=proposals, seed=seed)
    above, rare = np.empty(moves), []
    begin = time.perf_counter()
    for number in range(moves):
        mover.step(interval)
        above[number] = phi(made.context) > 0
        if above[number]:
            rare.append(made.context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    blocks = np.array([part.mean() for part in np.array_split(above, 40)])
    return {
        "population": float(above.mean()),
        "error": float(blocks.std(ddof=1) / math.sqrt(len(blocks))),
        "steps": made.currentStep,
        "acceptance": mover.statistics.acceptance,
        "seconds": time.perf_counter() - begin,
        "rare": np.array(rare),
    }


def residence_time(starts: NDArray[np.float64], limit: int, seed: int) -> tuple[float, int]:
    """Return the mean time in ps that dynamics stays at phi > 0, by maximum likelihood, and the number of escapes."""
    made, steps, escapes = simulation(seed), 0, 0
    for number, start in enumerate(starts):
        made.context.setPositions(start)
        made.context.setVelocitiesToTemperature(_TEMPERATURE, seed + number)
        for _ in range(limit // 100):
            made.step(100)
            steps += 100
            # Left behind once it is well on the other side: the edge is crossed back and forth.
            if -math.radians(150.0) < phi(made.context) < -math.radians(40.0):
                escapes += 1
                break
    return steps * _STEP / max(escapes, 1), escapes


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("model", type=Path, help="a generator of alanine dipeptide, from the demo")
    parser.add_argument("--moves", type=int, default=20_000)
    parser.add_argument("--interval", type=int, default=50, help="steps of dynamics between moves")
    parser.add_argument("--proposals", type=int, default=4, help="proposals of a move")
    parser.add_argument("--starts", type=int, default=24, help="trajectories for the time of residence")
    parser.add_argument("--limit", type=int, default=400_000, help="longest of them, steps")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = with_moves(options.model, options.moves, options.interval, options.proposals, options.seed)
    rare = found.pop("rare")
    chosen = np.random.default_rng(options.seed).choice(len(rare), min(options.starts, len(rare)), replace=False)
    residence, escapes = residence_time(rare[chosen], options.limit, options.seed)
    p, error = found["population"], found["error"]
    free_energy, free_energy_error = math.log((1 - p) / p), error / (p * (1 - p))
    reference = json.loads((EXAMPLES / "alanine_reference.json").read_text())
    # Two states: the variance of a mean over time T is 2 p (1 - p) tau / T, tau close to the time in the rare one.
    effective = p * (1 - p) / error**2
    plain = 2.0 * residence / _STEP * effective
    results = {
        **found,
        "interval": options.interval,
        "proposals": options.proposals,
        "seed": options.seed,
        "delta_f_kT": free_energy,
        "delta_f_error_kT": free_energy_error,
        "reference_delta_f_kT": reference["delta_f_kT"],
        "reference_error_kT": reference["delta_f_error_kT"],
        "effective_samples": effective,
        "residence_ps": residence,
        "escapes": escapes,
        "plain_steps": plain,
        "steps_over_plain": found["steps"] / plain,
    }
    rows = [
        ("steps of dynamics with moves", f"{found['steps']:,}"),
        ("acceptance", f"{100 * found['acceptance']:.1f} %"),
        ("population of phi > 0", f"{p:.5f} +- {error:.5f}"),
        ("its free energy", f"{free_energy:.3f} +- {free_energy_error:.3f} kT"),
        ("reference", f"{reference['delta_f_kT']:.3f} +- {reference['delta_f_error_kT']:.3f} kT"),
        ("time of residence at phi > 0", f"{residence:.0f} ps ({escapes} escapes)"),
        ("steps of plain dynamics for the same error", f"{plain:.2e}"),
        ("fraction", f"{found['steps'] / plain:.1e}"),
    ]
    report(
        "boltzmann_moves", "alanine dipeptide: moves of a Boltzmann generator in dynamics", ("", "value"), rows, results
    )


if __name__ == "__main__":
    main()
