"""Coarse-grained force fields whose training trajectories stay private: force matching with a trajectory as the unit.

A force field is more than its network: in :func:`~flowbridge.forcefields.training.fitting.train_force_field` prior terms,
standardisation and the examples kept with it come from the frames, too; the examples are frames, as they are. Here all three
come from a public prior: its own dynamics gives the frames for standardisation and examples, and costs nothing. The force map
must not come from private frames either: :func:`~flowbridge.forcefields.beads.force_maps.bonded_force_map` looks at bonds only.

Force matching needs no Boltzmann weights where the beads determine the bias of a simulation: at fixed beads the average of the
unbiased forces stays what it is. So frames of enhanced sampling serve as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ....core.errors import ConfigurationError
from ....core.units import thermal_energy
from ...batched_dynamics import LangevinReplicas
from ...beads.frames import BeadFrames
from ...coarse_grained_force_field import CoarseGrainedForceField
from ...networks.graph_network import GraphConfiguration
from ...networks.invariant_network import InvariantConfiguration
from ...prior_terms import PriorEnergy
from ..units import UnitData
from .sample_gradients import SampleGradients

_REPLICAS, _FRAMES = 64, 10
_STEPS, _STEP_PS, _FRICTION = 500, 0.002, 5.0


def public_force_field(
    prior: PriorEnergy, network: InvariantConfiguration | GraphConfiguration, start: Tensor, seed: int
) -> CoarseGrainedForceField:
    """Return an untrained force field that has seen no frames.

    Args:
        prior: prior from public knowledge (bond lengths of a standard force field, another data set); a prior fitted to
            the private frames is not covered by any ledger.
        network: its sizes; without a Lipschitz bound, which this training does not keep. Graphs are trained by DP-SGD.
        start: a public structure of the beads ``(n, 3)`` nm, from which the prior's dynamics starts.
        seed: random seed of that dynamics.

    Raises:
        ConfigurationError: for a prior without a temperature, or a Lipschitz bound.
        NonFiniteEnergyError: when the prior's energy of the start is not finite.
    """
    temperature = prior.metadata.temperature
    if temperature is None:
        raise ConfigurationError("the prior has no temperature, so there is no thermal energy to measure forces in")
    if isinstance(network, InvariantConfiguration) and network.lipschitz is not None:
        raise ConfigurationError(
            f"private force matching keeps no Lipschitz bound, and {network.lipschitz:g} was asked for: set lipschitz = None"
        )
    starts = start.double().expand(_REPLICAS, -1, -1).clone()
    replicas = LangevinReplicas(prior, starts, temperature, step_ps=_STEP_PS, friction_per_ps=_FRICTION, seed=seed)
    replicas.step(_STEPS)  # away from the start
    frames = torch.from_numpy(replicas.run(_FRAMES, _STEPS // _FRAMES)).double().reshape(-1, *start.shape)
    return CoarseGrainedForceField.untrained(prior, network, temperature, frames)


def trajectory_units(
    force_field: CoarseGrainedForceField, frames: BeadFrames, trajectories: Tensor, *, per_step: int | None = None
) -> UnitData:
    """Return private data: positions, and what the prior leaves of the forces in kT/nm.

    Args:
        force_field: force field from :func:`public_force_field`.
        frames: frames with forces in kJ/mol/nm; weights are refused, since a weight that depends on other frames breaks
            the units.
        trajectories: number ``(F,)`` of the trajectory of each frame.
        per_step: frames of a trajectory in a step.

    Raises:
        ConfigurationError: when forces are missing, frames are weighted, or the force field keeps some of them as examples.
    """
    if frames.forces is None or frames.weights is not None:
        raise ConfigurationError("private force matching takes frames with forces and without weights")
    _refuse_kept_frames(force_field, frames.positions)
    kt = thermal_energy(_temperature(force_field))
    _, prior_forces = force_field.prior.energy_and_forces(frames.positions)
    labels = (frames.forces - prior_forces.to(frames.forces.dtype)) / kt
    dtype = next(force_field.parameters()).dtype
    return UnitData(frames.positions.to(dtype), labels.to(dtype), trajectories, "trajectory", per_step)


def force_matching_gradients(force_field: CoarseGrainedForceField) -> SampleGradients:
    """Return a learner for the mean square error of a force component in kT/nm, with :func:`trajectory_units` for data."""
    network = force_field.network
    if network is None:
        raise ConfigurationError("this force field has no network to train")
    buffers = dict(network.named_buffers())

    def loss(parameters: Mapping[str, Tensor], positions: Tensor, labels: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            value: Tensor = torch.func.functional_call(network, {**parameters, **buffers}, (x[None],))[0]
            return value

        return (torch.func.grad(energy)(positions) + labels).square().mean()

    return SampleGradients(network, loss)


def _refuse_kept_frames(force_field: CoarseGrainedForceField, positions: Tensor) -> None:
    """Raise ConfigurationError when frames ``(F, n, 3)`` are among the examples that a force field keeps."""
    data = positions.flatten(1)
    kept = force_field.examples.to(data.dtype).flatten(1)
    copies = sum(int((data == example).all(1).any()) for example in kept)
    if copies:
        raise ConfigurationError(
            f"{copies} of the {len(kept)} example frames that this force field keeps in its file are frames of the private "
            "data: start from public_force_field(), or give it others by set_examples()"
        )


def _temperature(force_field: CoarseGrainedForceField) -> float:
    temperature = force_field.metadata.temperature
    if temperature is None:
        raise ConfigurationError("the force field has no temperature")
    return temperature
