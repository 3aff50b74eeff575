"""Langevin dynamics of many replicas at the same time in torch: one call of a potential moves all of them.

The splitting is BAOAB (Leimkuhler and Matthews, J. Chem. Phys. 138, 174102 (2013)): half a kick, half a drift, friction and
noise in closed form, half a drift, half a kick. Its configurations are accurate to fourth order in the time step for high
friction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigurationError, NonFiniteEnergyError
from ..core.potential import Potential
from ..core.units import thermal_energy

_CHECK_INTERVAL = 50  # steps between checks of the energies
_FAR = 3.0  # times the longest bond of the start


@dataclass
class ReplicaState:
    """Positions ``(R, N, 3)`` nm, velocities nm/ps, forces kJ/mol/nm, energies ``(R,)`` kJ/mol, and the steps done."""

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    energies: Tensor
    step: int = 0


class LangevinReplicas:
    """Independent copies of a molecule under one potential, each at its own temperature.

    Args:
        potential: any Potential without a box, compiled or not.
        positions: start ``(R, N, 3)`` nm of the replicas.
        temperatures: K; one number or one a replica.
        step_ps: time step.
        friction_per_ps: friction of the thermostat.
        seed: random seed of velocities and noise.
        last_good: file (npz) for the last good positions where a run has to be stopped; None writes none.

    Raises:
        ConfigurationError: for impossible numbers, or starts of another molecule.
        NonFiniteEnergyError: where the energy of a start is not finite.
    """

    def __init__(
        self,
        potential: Potential,
        positions: Tensor,
        temperatures: float | Tensor,
        *,
        step_ps: float,
        friction_per_ps: float = 1.0,
        seed: int = 1,
        last_good: Path | None = None,
    ) -> None:
        particles = potential.metadata.particles
        if positions.ndim != 3 or positions.shape[1:] != (len(particles), 3) or not len(positions):
            raise ConfigurationError(
                f"replicas of {len(particles)} particles start from (R, {len(particles)}, 3), got {tuple(positions.shape)}"
            )
        if potential.metadata.periodic:
            raise ConfigurationError("this potential needs a periodic box, which batched dynamics does not have")
        if not (step_ps > 0.0 and friction_per_ps >= 0.0):
            raise ConfigurationError(
                f"the time step ({step_ps} ps) and friction ({friction_per_ps}/ps) must be positive"
            )
        self.potential, self.step_ps, self.last_good = potential, step_ps, last_good
        self.generator = torch.Generator().manual_seed(seed)
        kelvin = torch.as_tensor(temperatures, dtype=torch.float64).expand(len(positions)).clone()
        for value in kelvin.tolist():
            thermal_energy(value)  # refuses what is no temperature
        self.temperatures = kelvin
        self.masses = torch.tensor(particles.masses, dtype=torch.float64)[None, :, None]
        self.decay = math.exp(-friction_per_ps * step_ps)
        self._set_widths()
        start = positions.detach().double().clone()
        self._longest = self._bond_limit(start)
        energy, forces = self.potential.energy_and_forces(start)
        self.state = ReplicaState(
            start, self._noise(len(start)) * self._velocity_width, forces.double(), energy.double()
        )
        self._good = start.clone()
        self._check()

    def _set_widths(self) -> None:
        kt = thermal_energy(1.0) * self.temperatures[:, None, None]
        self._velocity_width = (kt / self.masses).sqrt()

    def set_temperatures(self, temperatures: Tensor) -> None:
        """Give the replicas other temperatures ``(R,)`` in K; velocities stay as they are."""
        self.temperatures = temperatures.double().clone()
        self._set_widths()

    def _noise(self, count: int) -> Tensor:
        shape = (count, self.masses.shape[1], 3)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, steps: int) -> ReplicaState:
        """Make ``steps`` steps and return the state.

        Raises:
            NonFiniteEnergyError: where an energy stops being finite or beads fly apart, naming the replica, the bead and the
                term of the energy; the last good positions are in the file ``last_good`` then.
        """
        state, half = self.state, 0.5 * self.step_ps
        kick = half / self.masses
        spread = math.sqrt(1.0 - self.decay**2) * self._velocity_width
        for _ in range(steps):
            state.velocities += kick * state.forces
            state.positions += half * state.velocities
            state.velocities = self.decay * state.velocities + spread * self._noise(len(state.positions))
            state.positions += half * state.velocities
            energy, forces = self.potential.energy_and_forces(state.positions)
            state.energies, state.forces = energy.double(), forces.double()
            state.velocities += kick * state.forces
            state.step += 1
            if state.step % _CHECK_INTERVAL == 0:
                self._check()
        self._check()
        return state

    def run(
        self, frames: int, interval: int, announce: Callable[[int], object] = lambda frame: None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return frames ``(frames, R, N, 3)`` in nm, one after every ``interval`` steps; raises as :meth:`step`."""
        kept = np.empty((frames, *self.state.positions.shape), dtype=np.float32)
        for frame in range(frames):
            kept[frame] = self.step(interval).positions.numpy()
            announce(frame)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs for the same numbers: arrays only."""
        state = self.state
        return {
            "positions": state.positions.numpy(), "velocities": state.velocities.numpy(),
            "temperatures": self.temperatures.numpy(), "generator": self.generator.get_state().numpy(),
            "step": np.array(state.step), "longest": self._longest.numpy(),
        }  # fmt: skip

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        positions = torch.as_tensor(stored["positions"]).clone()
        energy, forces = self.potential.energy_and_forces(positions)
        velocities = torch.as_tensor(stored["velocities"]).clone()
        self.state = ReplicaState(positions, velocities, forces.double(), energy.double(), int(stored["step"]))
        self.generator.set_state(torch.as_tensor(stored["generator"]))
        self._longest = torch.as_tensor(stored["longest"])
        self.set_temperatures(torch.as_tensor(stored["temperatures"]))
        self._good = positions.clone()

    def _bond_limit(self, start: Tensor) -> Tensor:
        bonds = self.potential.metadata.particles.bonds
        if not bonds:
            return torch.full((0,), math.inf, dtype=torch.float64)
        return _FAR * self._bond_lengths(start).amax(0)

    def _bond_lengths(self, positions: Tensor) -> Tensor:
        first, second = torch.tensor(self.potential.metadata.particles.bonds).T
        return (positions[:, first] - positions[:, second]).norm(dim=-1)

    def _check(self) -> None:
        """Raise NonFiniteEnergyError where a replica is lost; otherwise remember the positions as good."""
        state = self.state
        lost = ~(torch.isfinite(state.energies) & torch.isfinite(state.forces).all(-1).all(-1))
        apart = torch.zeros_like(lost)
        if len(self._longest):
            apart = (self._bond_lengths(state.positions) > self._longest).any(-1)
        bad = lost | apart
        if not bool(bad.any()):
            self._good = state.positions.clone()
            return
        replica = int(bad.nonzero()[0])
        where = "none was written: give last_good"
        if self.last_good is not None:
            self.last_good.parent.mkdir(parents=True, exist_ok=True)
            np.savez(self.last_good, positions=self._good.numpy())
            where = f"they are in {self.last_good}"
        what = (
            "its beads have flown apart"
            if bool(apart[replica])
            else f"its energy is {float(state.energies[replica])} kJ/mol"
        )
        spot = state.positions[replica] if bool(torch.isfinite(state.positions[replica]).all()) else self._good[replica]
        raise NonFiniteEnergyError(
            f"replica {replica} at {float(self.temperatures[replica]):g} K was stopped near step {state.step}: {what}; "
            f"{self.potential.describe_strain(spot)}. Shorten the time step ({self.step_ps} ps), train on more data, or "
            f"add a prior term. The last good positions are of at most {_CHECK_INTERVAL} steps before: {where}"
        )
