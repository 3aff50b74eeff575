"""The same molecule with the spline flows of other libraries, as potentials: what a flow costs where it is built elsewhere.

All act on the coordinates of ``MoleculeCoordinates`` (torsions in radians, stiff coordinates whitened), so that only the
trained part differs. Widths are chosen so that the numbers of parameters agree with the flow they are compared with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowbridge.core.potential import Potential, PotentialMetadata
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates

_BINS = 8
_BOUND = 5.0  # splines act inside, and are the identity outside

LogDensity = Callable[[Tensor], Tensor]
Draw = Callable[[int], Tensor]
Made = tuple[nn.Module, LogDensity, Draw]


class ExternalFlow(Potential):
    """``-kT log p`` of a flow of another library on the coordinates of one of ours."""

    def __init__(self, ours: BoltzmannGenerator, flow: nn.Module, log_density: LogDensity, draw: Draw) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(ours.metadata.particles, temperature=ours.metadata.temperature)
        self.coordinates = ours.coordinates
        self.flow = flow
        self.log_density = log_density
        self.draw = draw

    def log_prob(self, positions: Tensor) -> Tensor:
        """Return log-densities ``(B,)`` of positions ``(B, N, 3)`` nm."""
        (circular, stiff), log_det = self.coordinates.inverse(positions)
        angles = 2.0 * math.pi * (circular - 0.5)
        return self.log_density(torch.cat([angles, stiff], 1).float()).double() + log_det

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """See :meth:`Potential.forward`."""
        assert self.metadata.temperature is not None
        return -thermal_energy(self.metadata.temperature) * self.log_prob(positions)

    def sample_positions(self, count: int) -> Tensor:
        """Draw positions ``(count, N, 3)`` nm."""
        with torch.no_grad():
            drawn = self.draw(count)
            circular = self.coordinates.layout.circular
            turns = (drawn[:, : len(circular)] / (2.0 * math.pi) + 0.5) % 1.0
            return self.coordinates(Coordinates(turns, drawn[:, len(circular) :])).value


def parameter_count(module: nn.Module) -> int:
    """Return the number of trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def external_flows(ours: BoltzmannGenerator) -> dict[str, ExternalFlow]:
    """Return the flows of the libraries that are installed, at the number of parameters of ``ours``."""
    makers = {"zuko": _zuko, "nflows": _nflows, "normflows": _normflows}
    circular = ours.flow.circular_dimension
    dimension = circular + ours.flow.stiff_dimension
    target = parameter_count(ours.flow)
    made = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                parts = _matched(lambda width, make=make: make(dimension, circular, width), target)
        except ImportError:
            continue
        made[name] = ExternalFlow(ours, *parts).requires_grad_(False).eval()
    return made


def _matched(make: Callable[[int], Made], target: int) -> Made:
    """Return the flow whose number of parameters is nearest to ``target``, by bisection of its width."""
    low, high = 4, 512
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameter_count(make(middle)[0]) < target else (low, middle)
    return min((make(width) for width in (low, high)), key=lambda made: abs(parameter_count(made[0]) - target))


def _zuko(dimension: int, circular: int, width: int) -> Made:
    """Neural circular spline flow with coupling transforms (two passes)."""
    import zuko

    flow = zuko.flows.NCSF(dimension, bins=_BINS, transforms=8, passes=2, hidden_features=(width, width))
    # All its coordinates are circular: stiff ones, of unit spread, are squeezed onto the circle.
    scale = torch.ones(dimension)
    scale[circular:] = math.pi / 8.0
    return flow, lambda x: flow().log_prob(x * scale) + scale.log().sum(), lambda n: flow().sample((n,)) / scale


def _nflows(dimension: int, circular: int, width: int) -> Made:
    """Rational-quadratic coupling transforms with linear tails: nflows has no circular ones."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

    def layer(number: int) -> nn.Module:
        mask = torch.arange(dimension) % 2 if number % 2 else (torch.arange(dimension) + 1) % 2
        return PiecewiseRationalQuadraticCouplingTransform(
            mask,
            lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=width, num_blocks=1),
            num_bins=_BINS,
            tails="linear",
            tail_bound=_BOUND,
        )

    flow = Flow(CompositeTransform([layer(number) for number in range(8)]), StandardNormal([dimension]))
    return flow, flow.log_prob, flow.sample


def _normflows(dimension: int, circular: int, width: int) -> Made:
    """Circular coupled rational-quadratic splines."""
    import normflows

    indices = list(range(circular))
    bound = torch.full((dimension,), _BOUND)
    bound[:circular] = math.pi
    layers = [
        normflows.flows.CircularCoupledRationalQuadraticSpline(
            dimension, 1, width, indices, num_bins=_BINS, tail_bound=bound, reverse_mask=bool(number % 2)
        )
        for number in range(8)
    ]
    base = normflows.distributions.UniformGaussian(dimension, indices, scale=torch.ones(dimension))
    flow = normflows.NormalizingFlow(base, layers)
    return flow, flow.log_prob, lambda n: flow.sample(n)[0]
