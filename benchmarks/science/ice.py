"""Ice XI in TIP4P-Ew: simulations of 16 rigid molecules at several temperatures, and free energies between them by MBAR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openmm import XmlSerializer
from torch import from_numpy

from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.core.execution.progress import track
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.bootstrap import Estimate
from flowbridge.core.units import thermal_energy
from flowbridge.flows.rigid.crystal import at_rest
from flowbridge.flows.rigid.energies import BodyEnergy
from flowbridge.flows.rigid.relaxation import RelaxedCrystal, relaxed
from flowbridge.integrations.genice import ice_structure
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, load_trajectory, run_all
from flowbridge.integrations.openmm.systems.rigid_water import RigidSystemEnergy, RigidWater, rigid_water
from flowbridge.integrations.pymbar import mbar_from_reduced_potentials


@dataclass(frozen=True)
class Protocol:
    """Protocol of the simulations of the crystal.

    Attributes:
        repeats: cells of 16 molecules along each axis.
        base: temperature of the base, K.
        ladder: further temperatures, K; between neighbours the ensembles must overlap.
        base_runs: independent trajectories at the base.
        frames: number of frames of each trajectory.
        interval: steps between frames.
        equilibration: steps before the first.
        step_ps: time step.
        friction: 1/ps.
        method: electrostatics.
        platform: OpenMM platform.
    """

    repeats: tuple[int, int, int] = (1, 1, 1)
    base: float = 250.0
    ladder: tuple[float, ...] = (208.0, 173.0, 144.0, 120.0, 100.0, 84.0, 71.0, 59.5, 50.0)
    base_runs: int = 10
    frames: int = 1000
    interval: int = 125
    equilibration: int = 5000
    step_ps: float = 0.002
    friction: float = 2.0
    method: str = "Ewald"
    platform: str = "CPU"

    def inputs(self) -> dict[str, Any]:
        """Return plain data, for the digest of a stage."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def crystal_of(protocol: Protocol) -> tuple[RigidWater, RelaxedCrystal]:
    """Return the System and its crystal at the minimum of the energy."""
    water = rigid_water(ice_structure("XI", protocol.repeats), method=protocol.method)  # type: ignore[arg-type]
    energy = BodyEnergy(water.bodies, RigidSystemEnergy(water.system, "Reference", workers=1))
    return water, relaxed(energy, water.configuration, from_numpy(water.box))


def simulate(protocol: Protocol, water: RigidWater, crystal: RelaxedCrystal, folder: Path, seed: int) -> None:
    """Run all trajectories that are not in ``folder`` yet, one after the other."""
    places = water.bodies.places(crystal.crystal.configuration(at_rest(water.bodies.count)))[0].numpy()
    runs = [
        LangevinRun(
            XmlSerializer.serialize(water.system), places, temperature, protocol.step_ps, protocol.friction,
            protocol.equilibration, protocol.interval, protocol.frames, seed + number, _file(folder, temperature, number),
            platform=protocol.platform,
        )
        for temperature, count in [(protocol.base, protocol.base_runs), *((t, 1) for t in protocol.ladder)]
        for number in range(count)
    ]  # fmt: skip
    missing = [run for run in runs if not run.file.is_file()]
    for _ in track(run_all(missing, ProcessExecutor(1)), "trajectories", len(missing)):
        pass


def _file(folder: Path, temperature: float, number: int) -> Path:
    return folder / f"{temperature:g}K-{number}.npz"


def samples_of(
    protocol: Protocol, water: RigidWater, folder: Path, temperature: float, runs: Sequence[int] | None = None
) -> WeightedSamples:
    """Return the frames of trajectories at one temperature, with their reduced potential ``"target"``."""
    numbers = runs if runs is not None else range(protocol.base_runs if temperature == protocol.base else 1)
    trajectories = [load_trajectory(_file(folder, temperature, number)) for number in numbers]
    energies = np.concatenate([one.energies for one in trajectories])
    positions = np.concatenate([one.positions for one in trajectories])
    reduced = energies / thermal_energy(temperature)
    return WeightedSamples(positions, np.zeros(len(reduced)), water.particles, temperature, {"target": reduced})


def mbar_reference(protocol: Protocol, water: RigidWater, folder: Path) -> dict[float, Estimate[float]]:
    """Return the free energy of each temperature less that of the base, in kT, from the ladder."""
    temperatures = [protocol.base, *protocol.ladder]
    energies = [
        samples_of(protocol, water, folder, temperature, [0]).reduced_potentials["target"] * thermal_energy(temperature)
        for temperature in temperatures
    ]
    every = np.concatenate(energies)
    reduced = np.stack([every / thermal_energy(temperature) for temperature in temperatures])
    names = [f"{temperature:g} K" for temperature in temperatures]
    result = mbar_from_reduced_potentials(reduced, [len(part) for part in energies], names)
    return {temperature: result.difference(names[0], f"{temperature:g} K") for temperature in protocol.ladder}
