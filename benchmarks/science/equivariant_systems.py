"""DW4, LJ13 and LJ55: how they are sampled, which flow learns them, and how the flow is evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowbridge
from flowbridge.core.execution.progress import track
from flowbridge.core.statistics.estimates import effective_sample_percent, mean_with_error
from flowbridge.core.training.processes import is_main_process
from flowbridge.flows.equivariant.fields.compiled_field import compiled
from flowbridge.flows.equivariant.fields.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow, FieldSettings
from flowbridge.flows.equivariant.mean_free import without_mean
from flowbridge.flows.equivariant.ordinary_equations import Solution, Solver, transport
from flowbridge.flows.equivariant.path_training import PathGradientStage
from flowbridge.flows.equivariant.replica_exchange import ReplicaExchange, ReplicaExchangeSettings, virial
from flowbridge.flows.equivariant.systems import DoubleWellParticles, LennardJonesCluster, ParticleSystem
from flowbridge.flows.equivariant.training import ContinuousFlowTraining, FlowMatchingStage, train_continuous_flow
from flowbridge.workflows.stages import StageFolder

VALIDATION = 2000  # samples at the end of the reference run: schedules were chosen by them, and no training sees them
_BATCH = 64  # configurations that are evaluated at once
_TEST_FRAMES = 20  # of each chain of a run of its own, which nothing was chosen by


@dataclass(frozen=True)
class Case:
    """A system with everything that its row of the table takes.

    Attributes:
        system: the energy.
        exchange: settings of the reference sampler.
        velocity: field of the flow; None where the system is sampled only.
        solver: solver of the flow, for densities and samples.
        training: training of the flow.
        asked: requirements: largest gap (nats) and smallest effective sample size (percent).
        floor: entropy, the best negative log-likelihood that there is, without the Gaussian constant, and its error.
        log_partition: log partition function of ``exp(-u)`` on the mean-free subspace, and its error.
    """

    system: ParticleSystem
    exchange: ReplicaExchangeSettings
    velocity: FieldSettings | None = None
    solver: Solver = field(default_factory=Solver)
    training: ContinuousFlowTraining = field(default_factory=ContinuousFlowTraining)
    asked: tuple[float, float] = (math.inf, 0.0)
    floor: tuple[float, float] = (math.nan, math.nan)
    log_partition: tuple[float, float] = (math.nan, math.nan)


CASES: dict[str, Case] = {
    "DW4": Case(
        DoubleWellParticles(),
        ReplicaExchangeSettings(
            temperatures=(1.0, 1.5, 2.2, 3.2), leapfrog_steps=8, equilibration=300, frames=500, spread=2.0
        ),
        GraphFieldSettings(hidden=64, features=32, triangles=24, radial=32, longest=10.0, crowding=1.0),
        Solver(steps=10),
        ContinuousFlowTraining(
            matching=FlowMatchingStage(steps=2500, batch=512, learning_rate=6e-3, group=16),
            path=(PathGradientStage(steps=700, batch=128, solver_steps=6, learning_rate=3e-3),),
            checkpoint_interval=50,
        ),
        (0.1, 85.0),
        (1.62, 0.01),
        (29.669, 0.005),
    ),
    "LJ13": Case(
        LennardJonesCluster(13),
        ReplicaExchangeSettings(temperatures=(1.0, 1.25, 1.6), leapfrog_steps=10, equilibration=300, frames=300),
        GraphFieldSettings(hidden=48, features=24, radial=48, longest=5.5, crowding=2.0),
        Solver(steps=16),
        ContinuousFlowTraining(
            matching=FlowMatchingStage(steps=3500, batch=256, learning_rate=3e-3, group=4),
            path=(
                PathGradientStage(steps=1200, batch=64, solver_steps=6, learning_rate=1.5e-3, final_learning_rate=6e-4),
                PathGradientStage(steps=2600, batch=64, solver_steps=8, learning_rate=8e-4, average=0.995),
            ),
            checkpoint_interval=50,
            compilation="auto",
        ),
        (0.6, 40.0),
        (-16.4, 0.1),
        (59.85, 0.02),
    ),
    "LJ55": Case(
        LennardJonesCluster(55),
        ReplicaExchangeSettings(
            chains=40, temperatures=(1.0, 1.12, 1.26), leapfrog_steps=10, equilibration=250, frames=30, thinning=5
        ),
    ),
}


def reference_samples(name: str, case: Case, output: Path, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Return samples ``(S, N, D)`` by replica exchange and what they were checked by; goes on where it was interrupted."""
    run = ReplicaExchange(case.system, case.exchange, seed)
    inputs = {"system": case.system.configuration(), "exchange": vars(case.exchange), "seed": seed}

    def work(folder: Path) -> Mapping[str, Any]:
        samples = run.run(folder, lambda items, total: track(items, f"{name}: replica exchange", total))
        value, error = virial(case.system, samples)
        energy = case.system.reduced_energy(samples).numpy()
        mean = mean_with_error(energy, np.zeros(len(energy)))
        return {
            "samples": len(samples),
            "virial": [value, error],
            "degrees_of_freedom": case.system.degrees_of_freedom,
            "energy": [float(mean.value), float(mean.error)],
            **run.statistics(),
        }

    stage = StageFolder.completed(output, f"samples-{name}", inputs, work)
    return run.run(stage.folder), stage.results or {}


def test_samples(name: str, case: Case, output: Path, seed: int) -> Tensor:
    """Return samples ``(S, N, D)`` of an independent run."""
    frames = min(_TEST_FRAMES, case.exchange.frames)
    part = replace(case, exchange=replace(case.exchange, frames=frames))
    return reference_samples(f"{name}-test", part, output, seed)[0]


def trained_flow(
    label: str, case: Case, samples: Tensor, output: Path, seed: int, field_settings: FieldSettings | None = None
) -> tuple[EquivariantFlow, dict[str, Any]]:
    """Return a flow trained on samples, from its model file where that is there; training goes on where it was interrupted."""
    settings = field_settings or case.velocity
    if settings is None:
        raise ValueError(f"no velocity field is set for {label}")
    inputs = {
        "system": case.system.configuration(),
        "exchange": vars(case.exchange),
        "samples": len(samples),
        "field": settings.model_dump(mode="json"),
        "solver": case.solver.model_dump(mode="json"),
        "training": case.training.model_dump(mode="json"),
        "seed": seed,
    }

    def work(folder: Path) -> Mapping[str, Any]:
        model = EquivariantFlow.untrained(case.system, samples, settings, case.solver, seed)
        energy = case.system.reduced_energy
        curves = train_continuous_flow(model.flow, samples, case.training, folder, energy=energy, seed=seed)
        if is_main_process():
            flowbridge.save(model, folder / "model.flow", provenance={"training": inputs})
        return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "curves": curves}

    stage = StageFolder.completed(output, f"train-{label}", inputs, work, together=True)
    model = flowbridge.load(stage.folder / "model.flow")
    if not isinstance(model, EquivariantFlow):
        raise TypeError(f"{stage.folder / 'model.flow'} holds a {type(model).__name__}")
    return model, stage.results or {}


def negative_log_likelihood(case: Case, model: EquivariantFlow, x: Tensor, solver: Solver | None = None) -> Tensor:
    """Return ``-log p`` ``(S,)`` in nats of reduced positions ``(S, N, D)``, with the Gaussian constant."""
    latent, divergence = in_batches(case, model, without_mean(x), backward=True, solver=solver)
    return -(model.flow.prior.log_prob(latent.double()) + divergence.double())


def in_batches(
    case: Case, model: EquivariantFlow, x: Tensor, *, backward: bool, solver: Solver | None = None
) -> Solution:
    """Return what ``transport`` gives, in batches of a size for which the training has compiled the field."""
    field = compiled(model.flow.field, case.training.compilation)
    parts = []
    with torch.no_grad():
        for part in x.to(model.flow.dtype).split(_BATCH):
            filled = torch.cat([part, part[:1].expand(_BATCH - len(part), -1, -1)])
            found = transport(field, filled, solver or case.solver, backward=backward)
            parts.append(Solution(found.value[: len(part)], found.divergence[: len(part)]))
    return Solution(torch.cat([part.value for part in parts]), torch.cat([part.divergence for part in parts]))


def evaluated(case: Case, model: EquivariantFlow, test: Tensor, draws: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return likelihood, weights and symmetries of a trained flow; its samples are kept as ``draws.npz`` in ``folder``.

    ``gap`` is paired: on each test sample ``-log p - u`` is known up to the partition function, whose reference value is
    subtracted, so the scatter of the energies, which the test set shares with its entropy, drops out.
    """
    begin = time.monotonic()
    losses = negative_log_likelihood(case, model, test).numpy()
    finer = case.solver.model_copy(update={"steps": 2 * case.solver.steps})
    fine = negative_log_likelihood(case, model, test[:500], finer).numpy()
    excess = losses - case.system.reduced_energy(test).numpy()
    latent = model.flow.prior.sample(draws, torch.Generator().manual_seed(seed))
    drawn, divergence = in_batches(case, model, latent, backward=False)
    log_prob = model.flow.prior.log_prob(latent.double()) - divergence.double()
    reduced = case.system.reduced_energy(drawn.double())
    log_weights = torch.where(torch.isfinite(reduced), -reduced - log_prob, -torch.inf).numpy()
    np.savez(folder / "draws.npz", samples=drawn.numpy(), log_weights=log_weights)
    constant = model.flow.prior.gaussian_constant
    standard = 1.0 / math.sqrt(len(losses))
    return {
        "nll": float(losses.mean()),
        "nll_without_constant": float(losses.mean()) - constant,
        "nll_error": float(losses.std()) * standard,
        "gap_to_floor": float(losses.mean()) - constant - case.floor[0],
        "gap": float(excess.mean()) - case.log_partition[0],
        "gap_error": math.hypot(float(excess.std()) * standard, case.log_partition[1]),
        "nll_change_with_twice_the_steps": float(fine.mean() - losses[:500].mean()),
        "effective_sample_percent": effective_sample_percent(log_weights),
        "draws": draws,
        "log_partition": float(np.logaddexp.reduce(log_weights) - math.log(draws)),
        "equivariance": {"float32": asymmetry(model, test[:50], torch.float32), "float64": asymmetry(model, test[:50])},
        "evaluation_seconds": time.monotonic() - begin,
    }


def moved(x: Tensor, seed: int, *, turned: bool = True) -> Tensor:
    """Return configurations ``(S, N, D)``, each permuted and, where ``turned``, rotated or reflected at random."""
    generator = torch.Generator().manual_seed(seed)
    count, particles, dimension = x.shape
    noise = torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(noise)
    order = torch.rand(count, particles, generator=generator).argsort(1)
    permuted = torch.gather(x, 1, order.unsqueeze(-1).expand_as(x))
    return permuted @ rotation.to(x.dtype) if turned else permuted


def asymmetry(model: EquivariantFlow, x: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """Return the largest relative change of ``log p`` under random rotations, reflections and permutations."""
    kept = model.flow.dtype
    flow = model.flow.to(dtype)
    with torch.no_grad():
        before = flow.log_prob(without_mean(x.double()).to(dtype))
        after = flow.log_prob(moved(without_mean(x.double()), 7).to(dtype))
    flow.to(kept)
    return float(((after - before).abs() / before.abs().clamp(min=1.0)).max())
