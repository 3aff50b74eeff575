"""The neural density of H. Cheng et al., J. Chem. Phys. 162, 034120 (2025), with cusps and decay built in.

    ln rho(r) = y(r) + ln sum_A exp(c_A - softplus(zeta_A) s_A) - 2 sqrt(pi) sum_A erf(Z_A r_A/2),   s_A = sqrt(r_A^2 + 1)

The last term has the slope -2 Z_A at the nucleus and is constant away from it; everything else is smooth there. The network
y sees, for each nucleus, the vector and s scaled by ``ln(1 + s)/s``. It is trained by regressing its gradient on the scores
of electrons, plus noise-contrastive estimation for the relative weights of regions (the recipe of microsoft/oneqmc, MIT
licence, reimplemented here; differences: c_A is a logarithm, and the noise also has a component as tight as each core).

The linear parts (the last layer, and the envelope to first order) are then refitted to all samples
(:mod:`~flowbridge.calculators.qmc.density.convex_fit`). The refit removes the noise of the last steps, and fits without one
group of walkers give the jackknife replicas of the error bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....core.errors import ConfigurationError
from ....core.training.objective import Objective, Plan, cosine
from ....core.training.trainer import Trainer
from ..electronic_structure import Quadrature
from ..molecule import Molecule
from ..wave_function.sampling import ElectronSamples
from .convex_fit import ConvexFit, DensityFitSettings, convex_fit
from .densities import DensityModel, LogDensity

_TINY = 1e-20  # bohr^2; keeps the distance differentiable on a nucleus


@dataclass(frozen=True)
class NeuralFitSettings:
    """How the network is trained.

    Attributes:
        steps: of Adam.
        batch: electrons in a step.
        rate: largest learning rate; it falls with a cosine.
        contrast: weight of noise-contrastive estimation.
        width: of the network.
        refit: how the last layer is fitted once more, see
        :class:`~flowbridge.calculators.qmc.density.convex_fit.DensityFitSettings`.

    Raises:
        ConfigurationError: for numbers that make no training.
    """

    steps: int = 3000
    batch: int = 2048
    rate: float = 1e-2
    contrast: float = 1.0
    width: int = 64
    refit: DensityFitSettings = field(default_factory=DensityFitSettings)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.width < 1 or not (self.rate > 0 and self.contrast >= 0):
            raise ConfigurationError(f"training needs positive numbers of steps, electrons and width, got {self}")


class _LogDensityNetwork(nn.Module):
    """ln rho up to a constant; float64."""

    def __init__(self, molecule: Molecule, width: int) -> None:
        super().__init__()
        atoms = len(molecule.numbers)
        self.register_buffer("centers", molecule.centers)
        self.register_buffer("charges", molecule.charges)
        self.input = nn.Linear(4 * atoms, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.output = nn.Linear(width, 1)
        self.decay = nn.Parameter(torch.ones(atoms))
        self.amplitude = nn.Parameter(torch.zeros(atoms))
        self.double()

    centers: Tensor
    charges: Tensor

    def forward(self, points: Tensor) -> Tensor:
        """Return ``ln rho`` ``(P,)`` at ``points`` ``(P, 3)``."""
        return self.with_features(points)[0]

    def with_features(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``ln rho`` ``(P,)`` and its derivatives by the last layer and the envelope, ``(P, width + 2 A)``."""
        away = points[:, None] - self.centers
        square = away.square().sum(2)
        soft = (1.0 + square).sqrt()
        scale = torch.log1p(soft) / soft
        features = torch.cat([away, soft[..., None]], 2) * scale[..., None]
        x = self.input(features.flatten(1))
        for layer in self.hidden:
            x = x + layer(functional.silu(x))
        parts = self.amplitude - functional.softplus(self.decay) * soft
        cusp = torch.erf(0.5 * self.charges * (square + _TINY).sqrt()).sum(1)
        value = self.output(x)[:, 0] + torch.logsumexp(parts, 1) - 2.0 * math.sqrt(math.pi) * cusp
        shares = torch.softmax(parts, 1)
        return value, torch.cat([x, shares, -shares * soft], 1)


class NeuralDensity(DensityModel):
    """A neural electron density, ``ln rho = network + c . features + shift``.

    Args:
        molecule: nuclei and electrons.
        electrons: integral of the density after the fit.
        width: of the network.
        refit: coefficients c ``(1 + R, Q)`` of the features and shifts ``(1 + R,)``, the fit first, then jackknife replicas;
            None for zeros.
    """

    def __init__(self, molecule: Molecule, electrons: float, width: int = 64, refit: ConvexFit | None = None) -> None:
        self.molecule, self.electrons, self.width = molecule, electrons, width
        self.network = _LogDensityNetwork(molecule, width)
        size = width + 2 * len(molecule.numbers)
        self.refit = refit or ConvexFit(torch.zeros(1, size, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        self.replicas = len(self.refit.shifts) - 1

    def evaluate(self, points: Tensor, derivatives: int = 0) -> LogDensity:
        """See :meth:`DensityModel.evaluate`."""
        empty = points.new_empty(0)
        if derivatives == 0:
            with torch.no_grad():
                return LogDensity(self._log_rho(points), empty, empty)
        with torch.enable_grad():
            leaf = points.detach().requires_grad_(True)
            values = self._log_rho(leaf)
            (gradients,) = torch.autograd.grad(values.sum(), leaf, create_graph=derivatives >= 2)
            laplacians = empty
            if derivatives >= 2:
                rows = [
                    torch.autograd.grad(gradients[:, axis].sum(), leaf, retain_graph=True)[0][:, axis]
                    for axis in range(3)
                ]
                laplacians = torch.stack(rows).sum(0)
        return LogDensity(values.detach(), gradients.detach(), laplacians)

    def replica_logs(self, points: Tensor) -> Tensor:
        """See :meth:`DensityModel.replica_logs`."""
        with torch.no_grad():
            values, features = self.network.with_features(points)
        return values + self.refit.coefficients[1:] @ features.T + self.refit.shifts[1:, None]

    def features(self, points: Tensor, derivatives: int = 0) -> tuple[Tensor, Tensor]:
        """Return the features ``(Q, P)``, and for one derivative their gradients ``(3, Q, P)``."""
        with torch.no_grad():
            if derivatives == 0:
                return self.network.with_features(points)[1].T, points.new_empty(0)
            slopes = []
            for axis in range(3):
                direction = torch.zeros_like(points)
                direction[:, axis] = 1.0
                pair = torch.func.jvp(lambda r: self.network.with_features(r)[1], (points,), (direction,))
                slopes.append(pair[1].T)
            return pair[0].T, torch.stack(slopes)

    def _log_rho(self, points: Tensor) -> Tensor:
        values, features = self.network.with_features(points)
        return values + features @ self.refit.coefficients[0] + self.refit.shifts[0]


def fit_neural_density(
    samples: ElectronSamples,
    grid: Quadrature,
    generator: torch.Generator,
    settings: NeuralFitSettings | None = None,
    spin: str = "total",
    *,
    progress: Callable[[int], Any] | None = None,
) -> NeuralDensity:
    """Train the density of all electrons, or of those with spin ``"up"`` or ``"down"``.

    Args:
        samples: configurations with scores.
        grid: quadrature for the normalisation.
        generator: of initial weights, batches and noise.
        settings: see :class:`NeuralFitSettings`.
        spin: which electrons.
        progress: called with the number of steps done.

    Raises:
        ConfigurationError: for fewer walkers than groups of the jackknife.
        ConvergenceError: when the loss becomes NaN or infinite, or the last fit does not converge.
    """
    chosen = settings or NeuralFitSettings()
    molecule = samples.molecule
    electrons = samples.electrons_of(spin)
    points = samples.positions[:, :, electrons].reshape(-1, 3)
    scores = samples.scores[:, :, electrons].reshape(-1, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        density = NeuralDensity(molecule, float(electrons.stop - electrons.start), chosen.width)
    network = density.network

    def loss(step: int, _: torch.Generator) -> Tensor:
        index = torch.randint(len(points), (chosen.batch,), generator=generator)
        return _loss(network, points[index], scores[index], molecule, generator, chosen.contrast)

    plan = Plan(
        chosen.steps, chosen.rate, (0.95, 0.999), schedule=lambda step: cosine(1.0, 1e-4, step, chosen.steps),
        # Scores diverge at nodes; a single electron there must not throw the network off.
        gradient_clip=lambda step: 10.0,
    )  # fmt: skip
    objective = Objective(network, plan, loss=loss, name="the neural density")
    objective.loss_advice = f"lower the rate {chosen.rate}"
    for done in Trainer(objective).steps():
        if progress is not None:
            progress(done)
    network.requires_grad_(False)
    refit = convex_fit(samples, electrons, density, density.features, grid, chosen.refit)
    fitted = NeuralDensity(molecule, density.electrons, chosen.width, refit)
    fitted.network = network
    return fitted


def _loss(
    network: nn.Module, points: Tensor, scores: Tensor, molecule: Molecule, generator: torch.Generator, contrast: float
) -> Tensor:
    leaf = points.clone().requires_grad_(True)
    values = network(leaf)
    (gradients,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
    loss = (gradients - scores).square().sum(1).mean()
    if contrast == 0.0:
        return loss
    noise = _noise(molecule, len(points), generator)
    on_noise = network(noise) - _log_noise_density(molecule, noise)
    on_data = values - _log_noise_density(molecule, points)
    return loss + contrast * (functional.softplus(on_noise).mean() + functional.softplus(-on_data).mean())


def _noise_components(molecule: Molecule) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, exponents and centres of the noise: a wide and a tight exponential on each nucleus."""
    charges = molecule.charges
    weights = torch.cat([charges, charges])
    exponents = torch.cat([torch.ones_like(charges), 2.0 * charges])
    return weights / weights.sum(), exponents, molecule.centers.repeat(2, 1)


def _noise(molecule: Molecule, count: int, generator: torch.Generator) -> Tensor:
    weights, exponents, centers = _noise_components(molecule)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    # A sum of three exponential variables has the radius of exp(-z r) in three dimensions.
    uniform = torch.rand(count, 3, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    radius = -uniform.log().sum(1) / exponents[chosen]
    direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return centers[chosen] + radius[:, None] * direction


def _log_noise_density(molecule: Molecule, points: Tensor) -> Tensor:
    weights, exponents, centers = _noise_components(molecule)
    distances = torch.cdist(points, centers)
    return torch.logsumexp(
        weights.log() + 3.0 * exponents.log() - math.log(8.0 * math.pi) - exponents * distances, dim=1
    )
