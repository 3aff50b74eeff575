"""Parallel tempering of a coarse-grained force field: replicas at several temperatures exchange them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.potential import Potential
from ..core.units import thermal_energy
from .batched_dynamics import LangevinReplicas


class ParallelTempering:
    """Ladders of replicas: each holds one replica at each temperature, and neighbours propose to exchange.

    The energy is the same function at all temperatures (only the thermostats differ), so the ensemble at the lowest
    temperature is that of plain dynamics there. Odd and even pairs take turns, which moves replicas steadily along the ladder.

    Args:
        potential: the energy.
        positions: ``(L, N, 3)`` nm, the start of each of L ladders.
        temperatures: K, increasing; the first is that of the ensemble.
        step_ps: time step.
        exchange_interval: steps between proposals.
        friction_per_ps: friction of the thermostat.
        seed: random seed.
        last_good: see :class:`~flowbridge.forcefields.batched_dynamics.LangevinReplicas`.
    """

    def __init__(
        self,
        potential: Potential,
        positions: Tensor,
        temperatures: Sequence[float],
        *,
        step_ps: float,
        exchange_interval: int = 500,
        friction_per_ps: float = 1.0,
        seed: int = 1,
        last_good: Path | None = None,
    ) -> None:
        if list(temperatures) != sorted(set(temperatures)) or not temperatures:
            raise ConfigurationError(f"temperatures must increase, got {list(temperatures)}")
        if exchange_interval < 1:
            raise ConfigurationError(f"exchange_interval must be at least 1, got {exchange_interval}")
        self.rungs, self.ladders = len(temperatures), len(positions)
        self.exchange_interval = exchange_interval
        self._kelvin = torch.tensor(temperatures, dtype=torch.float64)
        # Replica r of ladder l is number l * rungs + r; rung_of says at which temperature it is.
        self.rung_of = torch.arange(self.rungs).repeat(self.ladders, 1)
        self.replicas = LangevinReplicas(
            potential, positions.repeat_interleave(self.rungs, 0), self._kelvin.repeat(self.ladders), step_ps=step_ps,
            friction_per_ps=friction_per_ps, seed=seed, last_good=last_good,
        )  # fmt: skip
        self.proposed, self.accepted = np.zeros(max(self.rungs - 1, 0)), np.zeros(max(self.rungs - 1, 0))
        self._parity = 0

    @property
    def acceptance(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Fraction of accepted exchanges between neighbouring temperatures ``(T - 1,)``; NaN where none was proposed."""
        with np.errstate(invalid="ignore"):
            rate: np.ndarray[Any, np.dtype[np.float64]] = self.accepted / self.proposed
        return rate

    def lowest(self) -> Tensor:
        """Return the positions ``(L, N, 3)`` that are at the lowest temperature now."""
        positions = self.replicas.state.positions.reshape(
            self.ladders, self.rungs, *self.replicas.state.positions.shape[1:]
        )
        return positions[self.rung_of == 0]

    def run(
        self, frames: int, interval: int, announce: Callable[[int], object] = lambda frame: None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return frames ``(frames, L, N, 3)`` at the lowest temperature, one every ``interval`` steps.

        Raises as :meth:`LangevinReplicas.step`.
        """
        kept = np.empty((frames, self.ladders, *self.replicas.state.positions.shape[1:]), dtype=np.float32)
        for frame in range(frames):
            done = 0
            while done < interval:
                until_exchange = self.exchange_interval - self.replicas.state.step % self.exchange_interval
                steps = min(until_exchange, interval - done)
                self.replicas.step(steps)
                done += steps
                if self.rungs > 1 and self.replicas.state.step % self.exchange_interval == 0:
                    self.exchange()
            kept[frame] = self.lowest().numpy()
            announce(frame)
        return kept

    def exchange(self) -> None:
        """Propose to exchange neighbouring temperatures in all ladders, by the Metropolis rule."""
        energies = self.replicas.state.energies.reshape(self.ladders, self.rungs)
        at_rung = torch.argsort(self.rung_of, dim=1)  # replica at each rung
        beta = 1.0 / (thermal_energy(1.0) * self._kelvin)
        velocities = self.replicas.state.velocities.view(
            self.ladders, self.rungs, *self.replicas.state.velocities.shape[1:]
        )
        for low in range(self._parity, self.rungs - 1, 2):
            first, second = at_rung[:, low], at_rung[:, low + 1]
            rows = torch.arange(self.ladders)
            log_ratio = (beta[low] - beta[low + 1]) * (energies[rows, first] - energies[rows, second])
            draw = torch.rand(self.ladders, generator=self.replicas.generator, dtype=torch.float64).log()
            taken = draw < log_ratio
            self.proposed[low] += self.ladders
            self.accepted[low] += int(taken.sum())
            chosen = rows[taken]
            self.rung_of[chosen, first[taken]], self.rung_of[chosen, second[taken]] = low + 1, low
            # Velocities keep to the temperature: rescaled with it (Sugita and Okamoto, Chem. Phys. Lett. 314, 141 (1999)).
            ratio = math.sqrt(float(self._kelvin[low + 1] / self._kelvin[low]))
            velocities[chosen, first[taken]] *= ratio
            velocities[chosen, second[taken]] /= ratio
        self._parity = 1 - self._parity if self.rungs > 2 else 0
        self.replicas.set_temperatures(self._kelvin[self.rung_of.reshape(-1)])

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs for the same numbers: arrays only."""
        return {
            **self.replicas.state_dict(), "rung_of": self.rung_of.numpy(), "parity": np.array(self._parity),
            "proposed": self.proposed, "accepted": self.accepted,
        }  # fmt: skip

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.replicas.load_state_dict(stored)
        self.rung_of = torch.as_tensor(stored["rung_of"]).clone()
        self._parity = int(stored["parity"])
        self.proposed, self.accepted = np.array(stored["proposed"]), np.array(stored["accepted"])
