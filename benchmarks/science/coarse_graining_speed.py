"""Microseconds a step of a coarse-grained force field in OpenMM, in batched torch dynamics, in TorchMD; and of all atoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app

from flowbridge.core.compilation.building import accelerated
from flowbridge.core.model_files.files import load, save
from flowbridge.forcefields.batched_dynamics import LangevinReplicas
from flowbridge.forcefields.beads.mappings import five_beads
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.integrations.openmm import add_potential, particle_system
from flowbridge.integrations.openmm.forces.particles import particles_from_topology
from flowbridge.integrations.openmm.forces.prior_forces import add_coarse_grained_force_field

from ..harness import Timing, paired
from ..molecules import alanine_frames, alanine_topology
from .coarse_graining_torchmd import torchmd_is_installed, torchmd_stepper

_STEP_PS = 0.002
_REPLICAS = (1, 64, 1000)
_SECONDS_A_DAY = 86_400.0


def force_field(folder: Path) -> Path:
    """Write an untrained force field of the five beads of capped alanine, which costs what a trained one does."""
    mapping = five_beads(particles_from_topology(alanine_topology()[0]))
    frames = mapping.positions(alanine_frames(300))
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration())
    model = CoarseGrainedForceField.untrained(prior, InvariantConfiguration(), 300.0, torch.from_numpy(frames))
    folder.mkdir(parents=True, exist_ok=True)
    save(model.eval(), folder / "five_beads.flow")
    return folder / "five_beads.flow"


def stepper(system: openmm.System, positions: np.ndarray[Any, Any], steps: int) -> Any:
    """Return a function that does so many Langevin steps on the Reference platform."""
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, _STEP_PS)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    context.setVelocitiesToTemperature(300.0, 1)
    # The function holds the Context, which an integrator does not.
    return lambda: context.getIntegrator().step(steps)


def measure_speed(folder: Path, small: bool) -> dict[str, Any]:
    """Time everything side by side and return microseconds a step (of one replica)."""
    mode = "never" if small else "auto"
    file = force_field(folder)
    model = load(file).requires_grad_(False)
    topology, atoms = alanine_topology()
    start = model.example_positions(1, torch.Generator().manual_seed(1))
    all_atom = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    beads, native = particle_system(file), particle_system(file)
    add_potential(beads, file, compilation=mode)
    if isinstance(model, CoarseGrainedForceField):
        add_coarse_grained_force_field(native, model, compilation="never" if small else "always")
    steps = 20
    cases: dict[str, Any] = {
        "all atoms, OpenMM": stepper(all_atom, atoms, steps),
        "beads, add_potential": stepper(beads, start[0].numpy(), steps),
        "beads, native prior and network": stepper(native, start[0].numpy(), steps),
    }
    work = dict.fromkeys(cases, float(steps))
    for replicas in _REPLICAS[: 1 if small else None]:
        potential = model if small else accelerated(model, mode="auto", batch=min(replicas, 64))
        dynamics = LangevinReplicas(
            potential, start.expand(replicas, -1, -1), 300.0, step_ps=_STEP_PS, friction_per_ps=1.0
        )
        name = f"beads, torch, {replicas} replicas"
        cases[name] = lambda dynamics=dynamics: dynamics.step(steps)
        work[name] = float(steps * replicas)
        if torchmd_is_installed():
            for how, called in (("as it is", model), ("compiled", potential)):
                name = f"beads, TorchMD, {replicas} replicas, {how}"
                cases[name] = torchmd_stepper(
                    called, start.expand(replicas, -1, -1).clone(), 300.0, _STEP_PS, 1.0, steps
                )
                work[name] = float(steps * replicas)
    if not torchmd_is_installed():
        print("TorchMD is not installed: no rows of it")
    timings: dict[str, Timing] = paired(cases, work=work, rounds=2 if small else 7, seconds=0.02 if small else 0.3)
    result = {
        name: {"microseconds": one.median, "nanoseconds_a_day": _STEP_PS * 1e-3 * _SECONDS_A_DAY * 1e6 / one.median}
        for name, one in timings.items()
    }
    for name, one in result.items():
        print(f"{name:44s} {one['microseconds']:10.2f} us a step, {one['nanoseconds_a_day']:12.0f} ns/day")
    return result
