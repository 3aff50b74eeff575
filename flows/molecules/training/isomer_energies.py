"""Energies of isomers predicted from their graphs by Bayesian linear regression, updated with every evaluated energy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ....core.errors import ConfigurationError
from ..formulas import Formula

_FEWEST = 3  # molecules that a feature has to be in
_PRIOR = 0.5  # eV, deviation of the weight of a feature before anything is known
_DRIFT = 0.1  # eV, deviation of the weights of one formula from those of all
_LEVEL = 100.0  # eV, deviation of the mean of one formula: the first energy that is known tells it
_LEAST_NOISE = 1e-4  # eV²
_ROUNDS = 60  # of finding the noise


class Guess(NamedTuple):
    """Expected energies ``(B,)`` in eV and their joint covariance ``(B, B)`` in eV²."""

    mean: Tensor
    covariance: Tensor


class IsomerEnergies(nn.Module):
    """Energies of relaxed molecules as sums over the parts of their graphs.

    Its cost is negligible next to any calculator. The error is some tenths of an eV, which is enough to choose the isomers
    worth an evaluation.

    Args:
        features: names of the parts, see :func:`~flowbridge.flows.molecules.graph_features.graph_features`.
    """

    elements: Tensor
    weights: Tensor
    covariance: Tensor
    noise: Tensor

    def __init__(self, features: Sequence[str]) -> None:
        super().__init__()
        self.features = tuple(features)
        self._index = {name: index for index, name in enumerate(self.features)}
        count = len(self.features)
        self.register_buffer("elements", torch.zeros(len(Formula.parse("CH4").counts), dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(count, count, dtype=torch.float32))
        self.register_buffer("noise", torch.zeros((), dtype=torch.float64))

    @classmethod
    def fit(cls, formulas: Sequence[Formula], features: Sequence[Counter[str]], energies: Sequence[float]) -> Self:
        """Learn from relaxed molecules.

        Args:
            formulas: formulas of B molecules.
            features: graph features of each.
            energies: energy of each in eV.

        Raises:
            ConfigurationError: for no molecules, or lists of different lengths.
        """
        if not formulas or not len(formulas) == len(features) == len(energies):
            raise ConfigurationError(
                f"{len(formulas)} formulas, {len(features)} graphs and {len(energies)} energies: give as many of each"
            )
        seen = Counter(name for graph in features for name in graph)
        model = cls(sorted(name for name, count in seen.items() if count >= _FEWEST))
        counts = torch.tensor([formula.counts for formula in formulas], dtype=torch.float64)
        response = torch.tensor(energies, dtype=torch.float64)
        model.elements.copy_(torch.linalg.lstsq(counts, response.unsqueeze(1), driver="gelsd").solution.squeeze(1))
        model._regress(model.design(features), response - counts @ model.elements)
        return model

    def _regress(self, design: Tensor, response: Tensor) -> None:
        noise = float(response.var()) if len(response) > 1 else 1.0
        gram, moment = design.T @ design, design.T @ response
        identity = torch.eye(len(gram), dtype=torch.float64)
        # Expectation maximisation of the evidence (Bishop, Pattern Recognition and Machine Learning, 9.3.4): where there are
        # fewer molecules than features the noise does not vanish with the residuals.
        for _ in range(_ROUNDS):
            covariance = torch.linalg.inv(gram / noise + identity / _PRIOR**2)
            weights = covariance @ moment / noise
            residual = float((response - design @ weights).square().sum() + (gram * covariance).sum())
            noise = max(residual / len(response), _LEAST_NOISE)
        self.weights.copy_(weights)
        self.covariance.copy_(covariance)
        self.noise.fill_(noise)

    def design(self, features: Sequence[Counter[str]]) -> Tensor:
        """Return how often each known part is in each graph, ``(B, F)``; parts that were never seen are left out."""
        return _counts(features, self._index)

    def guess(
        self, formula: Formula, features: Sequence[Counter[str]], known: Sequence[float | None] | None = None
    ) -> Guess:
        """Return the energies of isomers, given those of some of them.

        Args:
            formula: common formula.
            features: graph features of B isomers.
            known: energies in eV that have been evaluated, None of isomers that have not.
        """
        design = self.design(features)
        mean = design @ self.weights + float(torch.tensor(formula.counts, dtype=torch.float64) @ self.elements)
        spread = self.covariance.double() + _DRIFT**2 * torch.eye(len(self.features), dtype=torch.float64)
        unseen = sorted({name for graph in features for name in graph if name not in self._index})
        new = _counts(features, {name: index for index, name in enumerate(unseen)})
        covariance = design @ spread @ design.T + _PRIOR**2 * new @ new.T + _LEVEL**2
        noise = self.noise * torch.eye(len(design), dtype=torch.float64)
        rows = [index for index, energy in enumerate(known or ()) if energy is not None]
        if not rows or known is None:
            return Guess(mean, covariance + noise)
        energies = torch.tensor([known[row] for row in rows], dtype=torch.float64)
        gain = torch.linalg.solve((covariance + noise)[rows][:, rows], covariance[rows]).T
        return Guess(mean + gain @ (energies - mean[rows]), covariance - gain @ covariance[rows] + noise)


def _counts(features: Sequence[Counter[str]], index: Mapping[str, int]) -> Tensor:
    design = torch.zeros(len(features), len(index), dtype=torch.float64)
    for row, graph in enumerate(features):
        for name, count in graph.items():
            if name in index:
                design[row, index[name]] = count
    return design
