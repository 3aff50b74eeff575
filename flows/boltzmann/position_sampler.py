"""Samples of a Boltzmann generator by a compiled program, a few at a time or millions."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.compilation.functions import Results
from ...core.errors import ConfigurationError
from ...core.reweighting import Draws
from ..transforms.root_finding import bounded_iterations
from .compiled_functions import ITERATIONS, CompiledFlowFunction
from .generator import BoltzmannGenerator
from .molecule_coordinates import Coordinates


class PositionSampler:
    """Draws configurations of a Boltzmann generator with their log-densities, ``batch`` at a time.

    Compiled code draws single configurations some twenty times as fast as torch does, which is what moves within a simulation
    need, and thousands at a time about twice as fast.

    Args:
        model: the generator; its parameters are read at every call.
        batch: configurations of one call of the program.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(self, model: BoltzmannGenerator, batch: int = 1, mode: str = "auto") -> None:
        if batch < 1:
            raise ConfigurationError(f"batch must be at least 1, got {batch}")
        self.model, self.batch = model, batch
        self._drawn = CompiledFlowFunction(model, samples, mode, _comparable)

    def __call__(self, count: int, generator: torch.Generator) -> Draws:
        """Draw; as :meth:`BoltzmannGenerator.sample_positions`.

        Raises:
            ConfigurationError: for a count below 1.
            ConvergenceError: where a root cannot be found.
        """
        if count < 1:
            raise ConfigurationError(f"the number of samples must be positive, got {count}")
        parts = [self._part(generator) for _ in range(0, count, self.batch)]
        return Draws(
            torch.cat([part.positions for part in parts])[:count], torch.cat([part.log_prob for part in parts])[:count]
        )

    def _part(self, generator: torch.Generator) -> Draws:
        latent = self.model.flow.sample_latent(self.batch, generator)
        with torch.no_grad():
            if not self._drawn.compiles:
                return self.model.positions_of(latent)
            positions, log_prob, found = self._drawn(*latent)
            if not bool(found.all()):
                # A few need more iterations than the program has.
                late = ~found
                positions[late], log_prob[late] = self.model.positions_of(Coordinates(*(part[late] for part in latent)))
            return Draws(positions, log_prob)


def samples(model: BoltzmannGenerator, circular: Tensor, stiff: Tensor) -> tuple[Tensor, ...]:
    """Return positions and log-densities of latent variables, and for which of them all roots were found."""
    with torch.no_grad(), bounded_iterations(ITERATIONS[circular.dtype]) as bounded:
        drawn = model.positions_of(Coordinates(circular, stiff))
        return (*drawn, bounded.converged(len(stiff)))


def _comparable(found: Results, expected: Results) -> tuple[Results, Results]:
    both = found[2] & expected[2]
    return [part[both] for part in found[:2]], [part[both] for part in expected[:2]]
