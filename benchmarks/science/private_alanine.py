"""Capped alanine whose trajectories stay private: errors of coarse-grained force fields against epsilon.

Reference frames are those of :mod:`.coarse_graining`. The first run is held out, the others are cut into blocks of 5 ps, and
each block counts as a trajectory of its own: **a block is the unit of privacy**. What is not trained is public: bonds and
angles of the prior are those of the all-atom force field, the force map looks at bonds only, and features are standardised on
the prior's own dynamics.

Surfaces need no dynamics: bonds, angles and torsions are drawn independently, and weighted by the Boltzmann factor.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbridge.core.model_files.files import save
from flowbridge.core.statistics.estimates import effective_sample_percent
from flowbridge.core.statistics.free_energy_surfaces import Surface, compare_surfaces
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.internal_coordinates import InternalCoordinates, InternalPoint
from flowbridge.flows.boltzmann.zmatrix import Row, ZMatrix
from flowbridge.forcefields.beads.force_maps import bonded_force_map
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.private.budget import Accountant, PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.force_matching import public_force_field, trajectory_units
from flowbridge.forcefields.private.training import train_privately
from flowbridge.forcefields.private.units import UnitData
from flowbridge.forcefields.training.modules import network_forces
from flowbridge.integrations.openmm.forces.public_prior import public_prior
from flowbridge.integrations.openmm.sampling.dynamics import load_trajectory
from flowbridge.workflows.coarse_graining.reference import load_beads, mapped_reference, reference_model
from flowbridge.workflows.figure_style import DRIVEN, FLOW, REFERENCE, drawn

from ..harness import OutOfTime, done_once, mean_and_deviation, report
from ..molecules import EXAMPLES
from .coarse_graining import ALANINE, settings_of
from .coarse_graining import SMALL as SMALL_REFERENCE

DELTA = 1e-5
EPSILONS = (1.0, 2.0, 4.0, 8.0)
METHODS = {"dp_mac": ("DP-MAC", FLOW), "dp_sgd": ("DP-SGD", DRIVEN)}
# Backbone C, N, CA, C, N: the torsions are phi and psi.
_CHAIN = ZMatrix(1, (Row(0, 1), Row(2, 1, 0), Row(3, 2, 1, 0), Row(4, 3, 2, 1)))
_WIDER = 1.15  # proposals of bonds and angles, against the spread of the reference frames


@dataclass(frozen=True)
class Sizes:
    """Sizes of the study."""

    block: int = 100
    held_out: int = 10_000
    proposals: int = 100_000
    steps: int = 200
    batch: int = 256
    plain_steps: int = 2000
    width: int = 32
    accountant: Accountant = "prv"


SMALL = Sizes(block=5, held_out=100, proposals=2000, steps=3, batch=10, plain_steps=5, width=8, accountant="rdp")


class PrivateAlanine:
    """Private frames, held-out frames, and the evaluation of force fields.

    Args:
        folder: folder of the reference simulation (the coarse-graining benchmark has one); simulated if it is empty.
        small: a simulation of seconds.
    """

    def __init__(self, folder: Path, *, small: bool) -> None:
        settings = settings_of("alanine_coarse.toml", SMALL_REFERENCE if small else ALANINE)
        self.sizes = SMALL if small else Sizes()
        self.temperature = settings.temperature
        model = reference_model(settings, EXAMPLES)
        done = mapped_reference(settings, model, EXAMPLES, folder)
        runs, beads = done["reference"], load_beads(done["beads"])
        force_map = bonded_force_map(model.mapping, model.constraints)
        files = (runs.results or {})["files"]
        forces = [force_map.forces(load_trajectory(runs.folder / "trajectories" / file).forces) for file in files]
        self.positions = beads.frames.positions
        self.forces = torch.from_numpy(np.concatenate(forces))
        self.first = beads.runs[0]  # frames of the run that is held out
        if model.molecule is None:
            raise ValueError("the prior is that of an all-atom force field")
        self.prior = public_prior(model.molecule.system, model.mapping, settings.temperature)
        self.start = torch.from_numpy(model.mapping.positions(model.positions[None])[0]).float()
        self.edges = [np.linspace(-np.pi, np.pi, settings.analysis.bins + 1)] * 2
        self._prepare_evaluation(beads.log_weights)

    def untrained(self, seed: int) -> CoarseGrainedForceField:
        """Return a public force field."""
        network = InvariantConfiguration(width=self.sizes.width, depth=2, lipschitz=None, seed=seed)
        return public_force_field(self.prior, network, self.start, seed=1)

    @cached_property
    def private_data(self) -> UnitData:
        """The private frames: blocks of the runs that are not held out. Labels know the prior, and no network."""
        frames = BeadFrames(self.positions[self.first :], self.forces[self.first :])
        blocks = torch.arange(len(frames)) // self.sizes.block
        return trajectory_units(self.untrained(0), frames, blocks, per_step=4)

    @cached_property
    def held_out(self) -> UnitData:
        """An even choice of the run that is held out."""
        chosen = torch.linspace(0, self.first - 1, self.sizes.held_out).long()
        frames = BeadFrames(self.positions[chosen], self.forces[chosen])
        return trajectory_units(self.untrained(0), frames, torch.arange(len(chosen)))

    def _prepare_evaluation(self, log_weights: np.ndarray[Any, Any]) -> None:
        coordinates = InternalCoordinates(_CHAIN)
        with torch.no_grad():
            found, _ = coordinates.inverse(self.positions)
            self.reference = Surface.of(found.torsions.numpy(), self.edges, log_weights)
            stiff = torch.cat([found.bonds, found.angles], dim=1)
            generator = torch.Generator().manual_seed(77)
            drawn_stiff = torch.randn(self.sizes.proposals, stiff.shape[1], generator=generator, dtype=torch.float64)
            turns = torch.rand(self.sizes.proposals, 2, generator=generator, dtype=torch.float64)
            self.torsions = (2.0 * turns - 1.0) * torch.pi
            stretched = stiff.mean(0) + _WIDER * stiff.std(0) * drawn_stiff
            bonds = found.bonds.shape[1]
            point = InternalPoint(stretched[:, :bonds], stretched[:, bonds:], self.torsions)
            self.proposed, log_volume = coordinates.forward(point)
            reduced = self.prior(self.proposed) / thermal_energy(self.temperature)
            self.log_ratio = log_volume + 0.5 * drawn_stiff.square().sum(1) - reduced

    @torch.no_grad()
    def evaluated(self, force_field: CoarseGrainedForceField) -> dict[str, float]:
        """Return the error of the forces, over the mean square of what the prior leaves of them, and of the surface."""
        if force_field.network is None:
            raise ValueError("there is no network to evaluate")
        held_out = self.held_out
        missed = network_forces(force_field.network, held_out.inputs) - held_out.targets
        energies = force_field.network(self.proposed.to(held_out.inputs.dtype)).double()
        log_weights = (self.log_ratio - energies).numpy()
        compared = compare_surfaces(Surface.of(self.torsions.numpy(), self.edges, log_weights), self.reference)
        return {
            "force_error": float(missed.square().mean() / held_out.targets.square().mean()),
            "surface_error": compared.mean_square_error.value,
            "jensen_shannon": compared.divergence.value,
            "effective_percent": effective_sample_percent(log_weights),
        }

    def private_run(self, method: str, epsilon: float, seed: int, file: Path) -> dict[str, float]:
        """Train within a budget, keep the model with its ledger, and evaluate it."""
        force_field = self.untrained(seed)
        settings = PrivateTraining.model_validate(
            {"method": method, "steps": self.sizes.steps, "batch": self.sizes.batch, "clip": _CLIP[method],
             "learning_rate": 0.05, "average": 0.9}
        )  # fmt: skip
        budget = PrivacyBudget(epsilon=epsilon, delta=DELTA, accountant=self.sizes.accountant)
        result = train_privately(force_field, self.private_data, budget, settings, seed=seed)
        save(force_field, file)
        return {**self.evaluated(force_field), "epsilon": result.ledger.epsilon}

    def plain_run(self, seed: int) -> dict[str, float]:
        """Train without privacy, and evaluate."""
        force_field = self.untrained(seed)
        data, network = self.private_data, force_field.network
        if network is None:
            raise ValueError("there is no network to train")
        optimiser = torch.optim.Adam(network.parameters(), lr=0.005)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.sizes.plain_steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.sizes.plain_steps):
            chosen = torch.randint(len(data.inputs), (512,), generator=generator)
            positions = data.inputs[chosen].requires_grad_(True)
            (gradient,) = torch.autograd.grad(network(positions).sum(), positions, create_graph=True)
            optimiser.zero_grad()
            (gradient + data.targets[chosen]).square().mean().backward()
            optimiser.step()
            schedule.step()
        return self.evaluated(force_field)


# Below all norms: every contribution is scaled to one length, and the step has no scale of its own under Adam.
_CLIP = {"dp_sgd": 1000.0, "dp_mac": 1.0}


def alanine(output: Path, reference: Path, seeds: int, deadline: float, *, small: bool) -> dict[str, Any]:
    """Train over seeds and budgets, print the table, draw the figure, and return the numbers."""
    epsilons = EPSILONS[:1] if small else EPSILONS
    study = PrivateAlanine(reference, small=small)
    results: dict[str, list[dict[str, float]]] = {}
    try:
        for seed in range(seeds):
            for name, found in _of_seed(study, output, epsilons, seed, deadline).items():
                results.setdefault(name, []).append(found)
    except OutOfTime:
        if not results:
            raise
        print(f"out of time after {len(results['none'])} of {seeds} seeds: the same command goes on")
    done = len(results["none"])
    rows = [_row(f"{epsilon:g}, {METHODS[m][0]}", results[f"{m} {epsilon:g}"]) for epsilon in epsilons for m in METHODS]
    rows += [_row("no privacy", results["none"]), _row("untrained", results["untrained"])]
    columns = ["epsilon", "force error", "surface error, kT²", "JS, nats"]
    title = f"Capped alanine, blocks of {study.sizes.block} frames as units, delta {DELTA:g}: {done} seeds"
    report("private_training_alanine", title, columns, rows, dict(results), small=small)
    draw(results, epsilons, output / "private_alanine.png")
    return dict(results)


def _of_seed(
    study: PrivateAlanine, output: Path, epsilons: tuple[float, ...], seed: int, deadline: float
) -> dict[str, dict[str, float]]:
    """Return the numbers of all trainings of a seed."""
    found = {
        "untrained": done_once(
            output / f"untrained-{seed}.json", lambda: study.evaluated(study.untrained(seed)), deadline
        ),
        "none": done_once(output / f"plain-{seed}.json", lambda: study.plain_run(seed), deadline),
    }
    for epsilon, method in itertools.product(epsilons, METHODS):
        file = output / f"{method}-{epsilon:g}-{seed}"

        def work(m: str = method, e: float = epsilon, f: Path = file) -> dict[str, float]:
            return study.private_run(m, e, seed, f.with_name(f"{f.name}.flow"))

        found[f"{method} {epsilon:g}"] = done_once(file.with_name(f"{file.name}.json"), work, deadline)
    return found


def _row(name: str, runs: list[dict[str, float]]) -> list[str]:
    digits = {"force_error": 4, "surface_error": 2, "jensen_shannon": 3}
    return [name, *(mean_and_deviation([run[key] for run in runs], places) for key, places in digits.items())]


def draw(results: dict[str, list[dict[str, float]]], epsilons: tuple[float, ...], file: Path) -> None:
    """Draw errors of forces and surfaces against epsilon: mean and deviation over seeds."""
    panels = {
        "force_error": ("force error (share of the labels' mean square)", "held-out forces"),
        "surface_error": ("mean square error (kT²)", "free-energy surface of φ and ψ"),
    }
    with drawn(file, 4.0) as figure:
        for axes, (key, (label, title)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for shift, (method, (name, colour)) in zip((0.97, 1.03), METHODS.items(), strict=True):
                values = np.array([[run[key] for run in results[f"{method} {epsilon:g}"]] for epsilon in epsilons])
                deviations = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
                at = shift * np.array(epsilons)
                axes.errorbar(at, values.mean(1), deviations, fmt="o-", color=colour, label=name, capsize=3.0)
            for which, style, name in (("none", "-", "no privacy"), ("untrained", ":", "untrained")):
                axes.axhline(
                    np.mean([run[key] for run in results[which]]), color=REFERENCE, linestyle=style, label=name
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
            axes.set_ylim(bottom=0.0)
            axes.set_xlabel("ε for each 5 ps of trajectory")
            axes.set_ylabel(label)
            axes.set_title(title)
        figure.axes[0].legend(loc="lower left")
