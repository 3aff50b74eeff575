"""Coarse-grain capped alanine so that no single trajectory shows in the force field, and see what the guarantee costs.

    python examples/private_force_field.py [runs/private_force_field]

OpenMM simulates many short trajectories, which stand for what each of as many owners would share. Five-bead force fields learn
from their forces by DP-MAC and DP-SGD, with a trajectory as the unit of privacy; everything that is not learned (prior, force
map, standardisation) is public. The models, with their ledgers, and a figure are in the folder; `flowbridge info` prints
a ledger. Needs opacus (pip install 'flowbridge[private]'); two minutes or so on one core.
"""

import sys
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

import flowbridge
from flowbridge.core.potential import Potential
from flowbridge.forcefields.batched_dynamics import LangevinReplicas
from flowbridge.forcefields.beads.force_maps import bonded_force_map
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.beads.geometry import angles
from flowbridge.forcefields.beads.mappings import five_beads
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.force_matching import public_force_field, trajectory_units
from flowbridge.forcefields.private.training import train_privately
from flowbridge.integrations.openmm.forces.particles import particles_from_topology
from flowbridge.integrations.openmm.forces.public_prior import public_prior
from flowbridge.workflows.figure_style import DRIVEN, FLOW, MD, REFERENCE, drawn

TEMPERATURE = 300.0
STRUCTURE = Path(__file__).parent / "alanine_dipeptide.pdb"
METHODS = {"dp_mac": ("DP-MAC", FLOW, 1.0), "dp_sgd": ("DP-SGD", DRIVEN, 1000.0)}  # clipped to these norms
ANGLE = torch.tensor([[0, 1, 2]])  # C-N-CA


def simulate(
    system: openmm.System, start: unit.Quantity, trajectories: int, frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and forces ``(trajectories, frames, atoms, 3)`` in nm and kJ/mol/nm, a frame every 50 fs."""
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.002)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context)
    positions, forces = [], []
    for number in range(trajectories):
        context.setVelocitiesToTemperature(TEMPERATURE, number + 1)
        integrator.step(250)
        for _ in range(frames):
            integrator.step(25)
            state = context.getState(positions=True, forces=True)
            positions.append(state.getPositions(asNumpy=True)._value)
            forces.append(state.getForces(asNumpy=True)._value)
    shape = (trajectories, frames, -1, 3)
    return np.reshape(positions, shape), np.reshape(forces, shape)


def force_error(force_field: CoarseGrainedForceField, frames: BeadFrames) -> float:
    """Mean square error of the forces, over that of the prior alone."""
    missed = force_field.energy_and_forces(frames.positions).forces - frames.forces
    without = force_field.prior.energy_and_forces(frames.positions).forces - frames.forces
    return float(missed.square().mean() / without.square().mean())


def angles_of(potential: Potential, start: torch.Tensor) -> np.ndarray:
    """Angles C-N-CA, degrees, in dynamics of the beads."""
    replicas = LangevinReplicas(
        potential, start.double().expand(60, -1, -1).clone(), TEMPERATURE, step_ps=0.002, friction_per_ps=5.0, seed=1
    )
    replicas.step(150)
    frames = torch.from_numpy(replicas.run(10, 20)).double().reshape(-1, *start.shape)
    return np.degrees(angles(frames, ANGLE)[:, 0].numpy())


def main(
    output: str | Path = "runs/private_force_field",
    trajectories: int = 500,
    frames: int = 20,
    steps: int = 100,
    sampling_rate: float = 0.5,
    epsilons: tuple[float, ...] = (2.0, 4.0, 8.0),
) -> dict[str, list[float]]:
    """Simulate, train, save, draw; returns force errors on held-out trajectories by method and epsilon."""
    torch.set_num_threads(1)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pdb, amber = app.PDBFile(str(STRUCTURE)), app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = amber.createSystem(pdb.topology, constraints=app.HBonds)
    pairs = [system.getConstraintParameters(n)[:2] for n in range(system.getNumConstraints())]
    atoms = particles_from_topology(pdb.topology, system)
    mapping = five_beads(atoms)
    positions, forces = simulate(system, pdb.positions, trajectories, frames)
    bead_positions = torch.from_numpy(mapping.positions(positions.reshape(-1, len(atoms), 3)))
    bead_forces = torch.from_numpy(bonded_force_map(mapping, pairs).forces(forces.reshape(-1, len(atoms), 3)))
    owners = torch.arange(trajectories).repeat_interleave(frames)
    private = owners % 5 > 0  # every fifth trajectory is for evaluation only
    shared, held_out = (BeadFrames(bead_positions[which], bead_forces[which]) for which in (private, ~private))

    # Public: the bonds and angles of the published force field, and the published structure.
    prior = public_prior(amber.createSystem(pdb.topology), mapping, TEMPERATURE)
    structure = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    start = torch.from_numpy(mapping.positions(structure[None])[0]).float()
    network = InvariantConfiguration(width=32, depth=2, lipschitz=None)
    budgeted: dict[str, list[float]] = {method: [] for method in METHODS}
    seen = {
        "all-atom model": np.degrees(angles(shared.positions, ANGLE)[:, 0].numpy()),
        "prior": angles_of(prior, start),
    }
    for epsilon in epsilons:
        budget = PrivacyBudget(epsilon=epsilon, delta=1e-4)
        for method, (name, _, clip) in METHODS.items():
            force_field = public_force_field(prior, network, start, seed=1)
            data = trajectory_units(force_field, shared, owners[private], per_step=4)
            settings = PrivateTraining(
                method=method,
                steps=steps,
                batch=round(sampling_rate * data.units),
                clip=clip,
                learning_rate=0.05,
                average=0.9,
            )
            ledger = train_privately(force_field, data, budget, settings).ledger
            flowbridge.save(force_field, folder / f"{method}-{epsilon:g}.flow")
            budgeted[method].append(force_error(force_field, held_out))
            print(f"{name}: {budgeted[method][-1]:.3f} of the prior's force error with {ledger.sentence}")
            seen[f"{name}, ε = {epsilon:g}"] = angles_of(force_field, start)
    draw(folder / "private_force_field.png", epsilons, budgeted, seen)
    print(f"figure in {folder}")
    return budgeted


def draw(file: Path, epsilons: tuple[float, ...], errors: dict[str, list[float]], seen: dict[str, np.ndarray]) -> None:
    """Force errors on the left, what the force fields do to an angle on the right."""
    with drawn(file, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for method, (name, colour, _) in METHODS.items():
            left.plot(epsilons, errors[method], "o-", color=colour, label=name)
        left.axhline(1.0, color=MD, linestyle=":", label="public prior")
        left.set_xscale("log", base=2)
        left.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        left.set_ylim(0.0, 1.1)
        left.set_xlabel("ε for each trajectory: the larger, the less private")
        left.set_ylabel("force error (fraction of the prior's)")
        left.legend(loc="lower left")
        bins = np.linspace(100.0, 150.0, 41)
        last = [f"{name}, ε = {epsilons[-1]:g}" for name, _, _ in METHODS.values()]
        right.hist(seen["all-atom model"], bins, density=True, color=MD, alpha=0.45, label="all-atom model")
        styles = (("prior", REFERENCE, ":"), (last[0], FLOW, "-"), (last[1], DRIVEN, "-"))
        for name, colour, style in styles:
            right.hist(seen[name], bins, density=True, histtype="step", color=colour, linestyle=style, label=name)
        right.set_xlabel("angle C-N-CA (degrees)")
        right.set_yticks([])
        right.legend(loc="upper left", fontsize=8.0)


if __name__ == "__main__":
    main(*sys.argv[1:2])
