"""Reference samples of a system of particles: Hamiltonian Monte Carlo in a ladder of temperatures that exchange."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ...core.statistics.bootstrap import Estimate
from ...core.statistics.estimates import mean_with_error
from .mean_free import MeanFreeNormal, without_mean
from .systems import ParticleSystem

FloatArray = NDArray[np.float64]
_STATE = "replica_exchange.npz"
_TENSORS = ("positions", "step_sizes", "accepted", "exchanged")
_ACCEPTANCE = (
    0.8  # that step sizes are adapted to: short trajectories decorrelate best a little above the optimum of 0.65
)


@dataclass(frozen=True)
class ReplicaExchangeSettings:
    """Settings of the sampler.

    Attributes:
        chains: independent chains, each with a replica at every temperature.
        temperatures: reduced temperatures in ascending order, the first of which is sampled: 1 for the ensemble itself.
        leapfrog_steps: leapfrog steps of one trajectory.
        equilibration: sweeps before the first sample, in which step sizes are adapted.
        thinning: sweeps from one sample of each chain to the next; a sweep is a trajectory of each replica and one round of
            exchanges of neighbours.
        frames: samples taken of each chain.
        spread: standard deviation of the positions that chains start from, in reduced lengths.
        checkpoint_interval: frames from one checkpoint to the next.
    """

    chains: int = 200
    temperatures: tuple[float, ...] = (1.0, 1.35, 1.8, 2.5)
    leapfrog_steps: int = 12
    equilibration: int = 500
    thinning: int = 10
    frames: int = 500
    spread: float = 1.0
    checkpoint_interval: int = 50

    def __post_init__(self) -> None:
        if min(self.chains, self.leapfrog_steps, self.thinning, self.frames, self.checkpoint_interval) < 1:
            raise ConfigurationError(f"numbers of chains, steps, sweeps and frames must be positive: {self}")
        if self.equilibration < 0 or not self.spread > 0.0:
            raise ConfigurationError(f"equilibration must not be negative and spread must be positive: {self}")
        ladder = self.temperatures
        if not ladder or ladder[0] <= 0.0 or any(b <= a for a, b in itertools.pairwise(ladder)):
            raise ConfigurationError(f"temperatures must be positive and ascending, got {ladder}")


@dataclass
class ReplicaExchange:
    """The state of a run: replicas ``(K, C, N, D)``, what was sampled, and the random numbers to come.

    Each replica's energy is that of temperature 1; at temperature T its weight is ``exp(-u / T)``.
    """

    system: ParticleSystem
    settings: ReplicaExchangeSettings
    seed: int
    positions: Tensor = field(init=False)
    step_sizes: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)
    sweep: int = field(init=False, default=0)
    frames: list[Tensor] = field(init=False, default_factory=list)
    accepted: Tensor = field(init=False)
    exchanged: Tensor = field(init=False)

    def __post_init__(self) -> None:
        levels, chains = len(self.settings.temperatures), self.settings.chains
        self.generator = torch.Generator().manual_seed(self.seed)
        prior = MeanFreeNormal(self.system.count, self.system.dimension, self.settings.spread)
        start = prior.sample(levels * chains, self.generator, torch.float64)
        start = _relaxed(self.system, start, 0.05 * self.settings.spread)
        self.positions = start.view(levels, chains, self.system.count, self.system.dimension)
        self.step_sizes = torch.full((levels,), 0.01 * self.settings.spread, dtype=torch.float64)
        self.accepted = torch.zeros(levels, dtype=torch.float64)
        self.exchanged = torch.zeros(max(levels - 1, 1), dtype=torch.float64)
        self._beta = 1.0 / torch.tensor(self.settings.temperatures, dtype=torch.float64)

    def run(
        self, folder: Path | None = None, progress: Callable[[Iterable[int], int], Iterable[int]] | None = None
    ) -> Tensor:
        """Return samples ``(frames * chains, N, D)`` in reduced lengths, float64, frame after frame.

        Args:
            folder: folder of checkpoints; a run of the same system, settings and seed goes on from the one it finds.
            progress: given an iterable and its length, yields from it while it shows progress.

        Raises:
            ConfigurationError: when the checkpoint in ``folder`` is of another run.
            NonFiniteEnergyError: when a chain ends up at a NaN energy.
        """
        if folder is not None:
            self._resume(folder)
        settings = self.settings
        last = settings.equilibration + settings.frames * settings.thinning
        complete = self.sweep >= last
        remaining: Iterable[int] = range(self.sweep, last)
        for number in remaining if progress is None else progress(remaining, last - self.sweep):
            self._trajectories(adapt=number < settings.equilibration)
            self._exchange(number % 2)
            self.sweep = number + 1
            taken = self.sweep - settings.equilibration
            if taken > 0 and taken % settings.thinning == 0:
                self.frames.append(self.positions[0].clone())
                if folder is not None and len(self.frames) % settings.checkpoint_interval == 0:
                    self._save(folder)
        if folder is not None and not complete:  # several processes may read what is there
            self._save(folder)
        return torch.cat(self.frames)

    def statistics(self) -> dict[str, Any]:
        """Return accepted fractions of trajectories and exchanges, and the step sizes, by temperature."""
        sweeps = max(self.sweep, 1)
        exchanges = self.exchanged / (0.5 * sweeps)
        return {
            "temperatures": list(self.settings.temperatures),
            "accepted": (self.accepted / sweeps).tolist(),
            "exchanged": exchanges.tolist()[: len(self.settings.temperatures) - 1],
            "step_sizes": self.step_sizes.tolist(),
        }

    def _energy_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = self.system.reduced_energy_and_gradient(x.flatten(0, 1))
        return energy.view(x.shape[:2]), gradient.view(x.shape)

    def _trajectories(self, adapt: bool) -> None:
        """Move every replica along one Hamiltonian trajectory, and accept it by the Metropolis rule."""
        beta = self._beta[:, None]
        x = self.positions
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
        velocity = noise - noise.mean(2, keepdim=True)  # the centre stays where it is
        energy, gradient = self._energy_and_gradient(x)
        before = beta * energy + 0.5 * velocity.square().sum((2, 3))
        # A trajectory of random length meets no period of the system.
        stretch = 0.8 + 0.4 * torch.rand(1, generator=self.generator, dtype=torch.float64)
        step = (self.step_sizes * stretch)[:, None, None, None]
        pull = self._beta[:, None, None, None]
        velocity = velocity - 0.5 * step * pull * gradient
        for number in range(self.settings.leapfrog_steps):
            x = x + step * velocity
            proposed, gradient = self._energy_and_gradient(x)
            factor = 0.5 if number == self.settings.leapfrog_steps - 1 else 1.0
            velocity = velocity - factor * step * pull * gradient
        after = beta * proposed + 0.5 * velocity.square().sum((2, 3))
        chance = torch.exp((before - after).clamp(max=0.0)).nan_to_num(0.0)  # an overlap beyond numbers is refused
        accept = torch.rand(chance.shape, generator=self.generator, dtype=torch.float64) < chance
        self.positions = torch.where(accept[..., None, None], x, self.positions)
        rate = accept.double().mean(1)
        self.accepted += rate
        if adapt:
            self.step_sizes = self.step_sizes * torch.exp(0.1 * (rate - _ACCEPTANCE))

    def _exchange(self, offset: int) -> None:
        """Let neighbours of the ladder swap configurations: (0,1), (2,3), .. in even sweeps, (1,2), .. in odd ones."""
        if len(self._beta) < 2:
            return
        energy = self.system.reduced_energy(self.positions.flatten(0, 1)).view(self.positions.shape[:2])
        if torch.isnan(energy).any():
            raise NonFiniteEnergyError(f"a chain arrived at a NaN energy in sweep {self.sweep}")
        positions = self.positions.clone()
        for low in range(offset, len(self._beta) - 1, 2):
            log_ratio = (self._beta[low] - self._beta[low + 1]) * (energy[low] - energy[low + 1])
            draw = torch.rand(log_ratio.shape, generator=self.generator, dtype=torch.float64)
            swap = (draw.log() < log_ratio)[:, None, None]
            positions[low] = torch.where(swap, self.positions[low + 1], self.positions[low])
            positions[low + 1] = torch.where(swap, self.positions[low], self.positions[low + 1])
            self.exchanged[low] += swap.double().mean()
        self.positions = positions

    def _identity(self) -> str:
        return json.dumps(
            {
                "system": [self.system.kind, self.system.configuration()],
                "settings": asdict(self.settings),
                "seed": self.seed,
            },
            sort_keys=True,
        )

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{_STATE}.part"
        with part.open("wb") as file:
            np.savez(
                file,
                identity=np.array(self._identity()),
                generator=self.generator.get_state().numpy(),
                sweep=np.array(self.sweep),
                frames=torch.stack(self.frames).numpy() if self.frames else np.zeros(0),
                **{name: getattr(self, name).numpy() for name in _TENSORS},
            )
        os.replace(part, folder / _STATE)

    def _resume(self, folder: Path) -> None:
        file = folder / _STATE
        if not file.is_file():
            return
        with np.load(file, allow_pickle=False) as state:
            if str(state["identity"]) != self._identity():
                raise ConfigurationError(
                    f"{file} belongs to a run of another system, other settings or another seed: give another folder"
                )
            for name in _TENSORS:
                setattr(self, name, torch.from_numpy(state[name]))
            self.generator.set_state(torch.from_numpy(state["generator"]))
            self.sweep = int(state["sweep"])
            self.frames = list(torch.from_numpy(state["frames"])) if state["frames"].size else []


def _relaxed(system: ParticleSystem, x: Tensor, longest: float, steps: int = 200) -> Tensor:
    """Return configurations after a descent in which no particle moves further than ``longest`` at once.

    Random starts overlap, and where two particles nearly coincide no trajectory of any use has a finite energy error.
    """
    for number in range(steps):
        gradient = system.reduced_energy_and_gradient(x).gradient
        size = gradient.norm(dim=-1, keepdim=True)
        limit = longest * (1.0 - number / steps)
        x = x - gradient * torch.minimum(limit / (size + 1e-12), torch.full_like(size, 1e-2 * longest))
    return without_mean(x)


def virial(system: ParticleSystem, x: Tensor, blocks: int | None = None) -> Estimate[float]:
    """Return the mean of ``(x - mean x) . grad u`` with its error: ``(N - 1) D`` in equilibrium at temperature 1.

    Args:
        system: system with the energy.
        x: samples ``(S, N, D)`` in reduced lengths.
        blocks: number of blocks of consecutive samples, for the error.
    """
    gradient = system.reduced_energy_and_gradient(x).gradient
    values = (without_mean(x) * gradient).sum((1, 2)).numpy()
    value, error = mean_with_error(values, np.zeros(len(values)), blocks=blocks)
    if not math.isfinite(float(value)):
        raise NonFiniteEnergyError("the virial of these samples is not finite: some particles overlap")
    return Estimate(float(value), float(error))
