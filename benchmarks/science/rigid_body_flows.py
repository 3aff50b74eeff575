"""Rigid-body flows (arXiv 2301.11355): a tetrahedral body in a field, and ice XI cooled from 250 K.

    python -m benchmarks.science.rigid_body_flows              # all of it; hours of one core the first time, resumable
    python -m benchmarks.science.rigid_body_flows tetrahedron  # minutes
    python -m benchmarks.science.rigid_body_flows ice          # simulations, MBAR, and what needs no training: 20 minutes
    python -m benchmarks.science.rigid_body_flows --small      # seconds: everything runs, nothing is learned

The harmonic contraction alone maps ice from 250 K to 100 K and 50 K, and a flow trained on three quarters of the frames
does; effective sample sizes are those of the rest. MBAR over a ladder of temperatures gives the reference. A
generator that starts from the harmonic crystal needs no simulation at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import flowbridge as fb
from flowbridge.core.errors import OverlapError
from flowbridge.core.statistics.targeted_free_energy import targeted_free_energy
from flowbridge.flows.rigid.configuration import RigidFlowConfiguration, RigidFlowTraining
from flowbridge.flows.rigid.generator import RigidBodyGenerator
from flowbridge.flows.rigid.temperature_map import RigidBodyMap
from flowbridge.flows.rigid.training import draws_of, train_by_work
from flowbridge.flows.rigid.works import summary, works_of
from flowbridge.integrations.openmm.systems.rigid_water import RigidSystemEnergy
from flowbridge.workflows.stages import StageFolder

from ..harness import report, study
from .ice import Protocol, crystal_of, mbar_reference, samples_of, simulate
from .tetrahedral_body import BODIES, DESIGN, Body, evaluated, trained

PUBLISHED = {100.0: -41.8569, 50.0: -114.2515}
"""MBAR, kT a molecule, and for 100 K an effective sample size of 23.75 %: result files of github.com/noegroup/rigid-flows."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        protocol: simulations of ice.
        targets: temperatures that ice is cooled to, K.
        map_training: training of the flow that maps samples.
        generator_training: training of the generator of ice.
        body_training: training of the generator of the tetrahedral body.
        body_frames: orientations it learns from.
        samples: number of samples that evaluate a generator.
    """

    protocol: Protocol
    targets: tuple[float, ...]
    map_training: RigidFlowTraining
    generator_training: RigidFlowTraining
    body_training: RigidFlowTraining
    body_frames: int
    samples: int


FULL = Plan(
    Protocol(),
    (100.0, 50.0),
    RigidFlowTraining(steps=600, batch=32, learning_rate=1e-3, checkpoint_interval=100),
    RigidFlowTraining(steps=400, batch=32, learning_rate=1e-3, checkpoint_interval=100),
    RigidFlowTraining(steps=2800, batch=256, learning_rate=5e-2, average=0.995, checkpoint_interval=250),
    20_000,
    20_000,
)
SMALL = Plan(
    Protocol(
        ladder=(205.0, 168.0, 137.0, 112.0, 100.0),
        base_runs=2,
        frames=100,
        interval=10,
        equilibration=1000,
        friction=10.0,
    ),
    (100.0,),
    RigidFlowTraining(steps=4, batch=8, checkpoint_interval=2),
    RigidFlowTraining(steps=4, batch=8, checkpoint_interval=2),
    RigidFlowTraining(steps=40, batch=64, learning_rate=2e-2, checkpoint_interval=20),
    500,
    500,
)


def body_results(body: Body, plan: Plan, output: Path, seed: int) -> dict[str, Any]:
    """Return what a generator of the tetrahedral body gives."""

    def work(folder: Path) -> Mapping[str, Any]:
        model = trained(body, plan.body_training, plan.body_frames, folder, seed)
        fb.save(model, folder / "body.flow")
        return evaluated(body, model.sample(plan.samples, body.system(), seed + 1))

    inputs = {
        "charges": list(body.charges), "strength": body.strength, "training": plan.body_training.model_dump(mode="json"),
        "frames": plan.body_frames, "samples": plan.samples, "seed": seed, "design": DESIGN.model_dump(mode="json"),
    }  # fmt: skip
    return _results(StageFolder.completed(output, "tetrahedron", inputs, work))


class Ice:
    """The crystal, its simulations and what flows make of them."""

    def __init__(self, plan: Plan, output: Path, seed: int) -> None:
        self.plan, self.output, self.seed = plan, output, seed
        self.water, self.crystal = crystal_of(plan.protocol)
        self.inputs = {**plan.protocol.inputs(), "seed": seed}
        self._design = RigidFlowConfiguration(closed="forward", seed=seed)
        self.energy = RigidSystemEnergy(self.water.system, plan.protocol.platform, workers=1)
        self.simulations = StageFolder.completed(output, "simulate", self.inputs, self._simulate)

    def reference(self) -> dict[str, Any]:
        """Return MBAR's free energies a molecule."""
        found = mbar_reference(self.plan.protocol, self.water, self.simulations.folder)
        count = self.water.bodies.count
        return {f"{t:g}": {"value": e.value / count, "error": e.error / count} for t, e in found.items()}

    def map_results(self, temperature: float, steps: int) -> dict[str, Any]:
        """Return what a map from the base to ``temperature`` gives, after so many steps of training."""
        settings = self.plan.map_training.model_copy(update={"steps": steps})
        design = self._design if steps else self._design.model_copy(update={"repetitions": 0})
        inputs = {
            **self.inputs, "temperature": temperature, "training": settings.model_dump(mode="json"),
            "design": design.model_dump(mode="json"),
        }  # fmt: skip
        return _results(
            StageFolder.completed(self.output, "map", inputs, partial(self._map, temperature, settings, design))
        )

    def generator_results(self, temperature: float) -> dict[str, Any]:
        """Return what a generator at ``temperature`` gives."""
        settings = self.plan.generator_training
        inputs = {
            "repeats": list(self.plan.protocol.repeats), "method": self.plan.protocol.method, "temperature": temperature,
            "training": settings.model_dump(mode="json"), "samples": self.plan.samples, "seed": self.seed,
            "design": self._design.model_dump(mode="json"),
        }  # fmt: skip
        return _results(
            StageFolder.completed(self.output, "generator", inputs, partial(self._generator, temperature, settings))
        )

    def _simulate(self, folder: Path) -> dict[str, Any]:
        simulate(self.plan.protocol, self.water, self.crystal, folder, self.seed)
        return {"minimum": self.crystal.energy}

    def _map(
        self, temperature: float, settings: RigidFlowTraining, design: RigidFlowConfiguration, folder: Path
    ) -> dict[str, Any]:
        samples = samples_of(self.plan.protocol, self.water, self.simulations.folder, self.plan.protocol.base)
        crystal = self.crystal.crystal
        model = RigidBodyMap.untrained(self.water.bodies, crystal, samples, temperature, design)
        frames, target = model.frames(samples, self.energy), model.ensemble(self.energy)
        cut = len(frames) * 3 // 4
        training, held_out = frames[:cut], frames[cut:]
        if settings.steps:
            # A part of the training frames decides when to stop: those that are reported are never looked at.
            stop = cut * 9 // 10
            train_by_work(
                model.flow, frames[:stop].draw, target, settings, folder, self.seed, held_out=frames[stop:cut]
            )
        fb.save(model, folder / "cooling.flow")
        found = {
            name: summary(works_of(model.flow, part.coordinates, part.reduced, target))._asdict()
            for name, part in (("training", training), ("held_out", held_out))
        }
        return {**found, **self._both_directions(model, samples.subset(slice(cut, None)), temperature)}

    def _both_directions(self, model: RigidBodyMap, samples: Any, temperature: float) -> dict[str, Any]:
        cold = samples_of(self.plan.protocol, self.water, self.simulations.folder, temperature)
        try:
            found = targeted_free_energy(samples, cold, self.energy, self.energy, model.configuration_map())
        except OverlapError as error:
            return {"both_directions": None, "reason": str(error)}
        return {"both_directions": {"value": found.difference.value, "error": found.difference.error}}

    def _generator(self, temperature: float, settings: RigidFlowTraining, folder: Path) -> dict[str, Any]:
        water, crystal = self.water, self.crystal
        model = RigidBodyGenerator.harmonic(
            water.particles, temperature, water.bodies, crystal.crystal, crystal.curvature, self._design
        )
        if settings.steps:
            train_by_work(model.flow, draws_of(model.base), model.ensemble(self.energy), settings, folder, self.seed)
        fb.save(model, folder / "ice.flow")
        samples = model.sample(self.plan.samples, self.energy, self.seed + 1)
        weights = samples.log_weights
        replicas = np.random.default_rng(self.seed).choice(weights, (200, len(weights)))
        estimates = np.log(len(weights)) - np.logaddexp.reduce(replicas, axis=1)
        return {
            "effective_percent": samples.effective_sample_percent(),
            "free_energy": float(np.log(len(weights)) - np.logaddexp.reduce(weights)),
            "error": float(estimates.std()),
        }


def _results(stage: StageFolder) -> dict[str, Any]:
    if stage.results is None:
        raise RuntimeError(f"the stage in {stage.folder} has no results")
    return stage.results


def report_body(name: str, plan: Plan, output: Path, seed: int) -> dict[str, Any]:
    """Train, print and return what there is on a tetrahedral body."""
    body = BODIES[name]
    found = {body.name: body_results(body, plan, output, seed)}
    rows = []
    for title, one in found.items():
        modes = zip(one["modes"], one["mode_errors"], one["modes_exact"], strict=True)
        rows.append(
            (
                title,
                f"{one['effective_percent']:.1f} %",
                ", ".join(f"{value:.3f}({1000 * error:.0f})" for value, error, _ in modes),
                ", ".join(f"{value:.3f}" for value in one["modes_exact"]),
                f"{one['free_energy']:.3f} / {one['free_energy_exact']:.3f}",
                f"{one['wall_seconds']:.0f} s",
            )
        )
    columns = ("tetrahedral body", "ESS", "weights of the modes", "exact", "free energy / exact, kT", "time")
    title, results = "Rigid-body flows: a body in a field at 100 K", {"seed": seed, "bodies": found}
    report(
        f"rigid_body_flows_{name.replace('-', '_')}", title, columns, rows, results, small=plan.samples == SMALL.samples
    )
    return found


def report_ice(name: str, plan: Plan, output: Path, seed: int) -> dict[str, Any]:
    """Simulate, train where the name says so, print and return what there is on ice."""
    training = name == "trained-ice"
    ice = Ice(plan, output, seed)
    count = ice.water.bodies.count
    reference = ice.reference()
    generators = {t: ice.generator_results(t) for t in (plan.protocol.base, *plan.targets) if training}
    rows, found = [], {}
    for temperature in plan.targets:
        maps = {"harmonic contraction": ice.map_results(temperature, 0)}
        if training:
            maps["trained flow"] = ice.map_results(temperature, plan.map_training.steps)
        mbar = reference[f"{temperature:g}"]
        rows.append((f"{temperature:g} K: MBAR", "", f"{mbar['value']:.4f} +- {mbar['error']:.4f}", "", ""))
        if temperature in PUBLISHED:
            rows.append(("published MBAR (ESS at 100 K: 23.75 %)", "", f"{PUBLISHED[temperature]:.4f}", "", ""))
        for title, one in maps.items():
            both = one["both_directions"]
            rows.append(
                (
                    title,
                    f"{one['held_out']['effective_percent']:.1f} %",
                    f"{one['held_out']['free_energy'] / count:.4f}",
                    f"{both['value'] / count:.4f} +- {both['error'] / count:.4f}" if both else "no overlap",
                    f"{one['wall_seconds']:.0f} s",
                )
            )
        if training:
            rows.append(_generator_row(generators[temperature], generators[plan.protocol.base], count))
        found[f"{temperature:g}"] = {"mbar": mbar, "maps": maps}
    columns = ("ice XI, 16 molecules", "ESS, held out", "F - F(250 K), kT a molecule", "both directions", "time")
    results = {"seed": seed, "temperatures": found, "generators": {f"{t:g}": one for t, one in generators.items()}}
    title, file = "Rigid-body flows: ice cooled from 250 K", f"rigid_body_flows_{name.replace('-', '_')}"
    report(file, title, columns, rows, results, small=plan.samples == SMALL.samples)
    return results


def _generator_row(cold: dict[str, Any], warm: dict[str, Any], count: int) -> tuple[str, ...]:
    difference = (cold["free_energy"] - warm["free_energy"]) / count
    error = float(np.hypot(cold["error"], warm["error"])) / count
    estimate = f"{difference:.4f} +- {error:.4f}"
    percent, seconds = f"{cold['effective_percent']:.1f} %", f"{cold['wall_seconds']:.0f} s"
    return "generators, no simulation", percent, estimate, "", seconds


REPORTS = {"tetrahedron": report_body, "uneven-tetrahedron": report_body, "ice": report_ice, "trained-ice": report_ice}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = study(__doc__, "runs/rigid_body_flows")
    parser.add_argument("system", nargs="?", choices=tuple(REPORTS), help="all where left out")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", help="K that ice is cooled to; 100 and 50 where left out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = SMALL if options.small else FULL
    if options.temperatures:
        unknown = set(options.temperatures) - set(plan.protocol.ladder)
        if unknown:
            parser.error(f"{sorted(unknown)} K are not in the ladder {plan.protocol.ladder}")
        plan = replace(plan, targets=tuple(options.temperatures))
    Console().print(f"stages are kept in {options.output}", highlight=False, soft_wrap=True)
    for name in [options.system] if options.system else REPORTS:
        REPORTS[name](name, plan, options.output, options.seed)


if __name__ == "__main__":
    main()
