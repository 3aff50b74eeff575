"""The Jastrow factor: correlation of electrons with each other and with nuclei, linear in its parameters.

``J = sum_pairs Gamma r/(1 + r) + sum_k p_k f_k``. The first term has the cusps of the exact wave function (Gamma 1/4 for
equal spins, 1/2 for opposite ones); the terms with parameters have zero slope where particles meet, so that cusps stay
exact for all parameters:

- electron-electron-nucleus: ``sum_ij u_iA^l u_jA^m v_ij^n`` with ``u = 1/(1 + r_iA^2/2)`` and ``v = r_ij^2/(1 + r_ij^2)``,
  one set of parameters for each element;
- electron-electron: ``v_ij^n``;
- two electrons at two nuclei, see :mod:`~flowbridge.calculators.qmc.wave_function.two_center_terms`;
- one-electron terms of :class:`~flowbridge.calculators.qmc.wave_function.atomic_functions.AtomicFunctions`, which correct
  the density as well as the energy;
- for open shells, one-electron terms with the opposite sign for electrons of spin down. Cusps that differ for equal and
  opposite spins repel core electrons that have the spin of the unpaired ones, and these terms compensate for it: without them
  the spin density at the nucleus of nitrogen is 0.85 instead of 0.1 atomic units.

All derivatives are in closed form. With ``T[i, A, m, n] = sum_j v_ij^n u_jA^m`` and its derivatives by ``r_i``, every term
and derivative is a product of one-electron quantities, computed by a few small matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .atomic_functions import AtomicFunctions
from .two_center_terms import TwoCenterTerms

POWERS = 3
"""Highest power of u and of v."""

_EQUAL_SPINS, _OPPOSITE_SPINS = 0.25, 0.5  # Gamma

TERMS = tuple(
    (left, right, pair)
    for pair in range(POWERS + 1)
    for left in range(POWERS + 1)
    for right in range(min(left, 2) + 1)
    if left + right + pair <= POWERS + 1 and left >= 1
)
"""Exponents (l, m, n) of the electron-electron-nucleus terms."""


class JastrowTerms(NamedTuple):
    """J ``(W,)``, its gradient ``(W, N, 3)`` and the sum over electrons of its Laplacian ``(W,)``."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


class JastrowDerivatives(NamedTuple):
    """For every parameter, ``(W, K)``: the term itself, and ``sum_i lap_i f + 2 v_i . grad_i f`` for given v."""

    values: Tensor
    operated: Tensor


class _Nuclear(NamedTuple):
    """Powers of u at electrons (W, N) from nuclei A, with L = POWERS + 1 powers from zero."""

    powers: Tensor  # (W, N, A, L)
    slopes: Tensor  # (W, N, A, L) derivative by r, over r
    laplacians: Tensor  # (W, N, A, L)
    away: Tensor  # (W, N, A, 3) from the nucleus


class _PartnerSums(NamedTuple):
    """Sums over partners j of ``v_ij^n u_jA^m`` or of combinations of them, with derivatives by electron i."""

    sums: Tensor
    gradients: Tensor
    curvatures: Tensor


class _PairBlocks(NamedTuple):
    """Powers of v between electrons i and j; B is the number of powers from one on."""

    values: Tensor  # (W, N, 1 + B, N)
    gradients: Tensor  # (W, 3, N, B, N)
    curvatures: Tensor  # (W, N, B, N)

    @classmethod
    def of(cls, distances: Tensor, difference: Tensor, others: Tensor, derivatives: int) -> _PairBlocks:
        """Build from distances ``(W, N, N)``, ``r_i - r_j`` ``(W, N, N, 3)`` and ``others``, zero on the diagonal, else one.

        Curvatures are left empty for fewer than two ``derivatives``.
        """
        values, slopes, laplacians = _pair_powers(distances)
        steepness = torch.stack([others * slopes[n] for n in range(1, POWERS + 1)], 2)
        return cls(
            torch.stack([others * values[n] for n in range(POWERS + 1)], 2),
            steepness[:, None] * difference.permute(0, 3, 1, 2)[:, :, :, None],
            torch.stack([others * laplacians[n] for n in range(1, POWERS + 1)], 2)
            if derivatives >= 2
            else distances.new_empty(0),
        )

    def contracted(self, powers: Tensor, matrices: Tensor) -> _PartnerSums:
        """Return ``sum_jnm v_ij^n C_lm^n u_j^m`` ``(W, N, A, L)`` for matrices C ``(A, n, L, L)``, and derivatives."""
        walkers, electrons, nuclei, size = powers.shape
        mixed = powers.permute(2, 0, 1, 3).reshape(nuclei, walkers * electrons, size) @ matrices.flatten(1, 2).mT
        mixed = mixed.reshape(nuclei, walkers, electrons, POWERS + 1, size).permute(1, 3, 2, 0, 4)
        mixed = mixed.reshape(walkers, (POWERS + 1) * electrons, nuclei * size)
        shape = (walkers, electrons, nuclei, size)
        beyond = mixed[:, electrons:]
        gradients = self.gradients.flatten(3).flatten(1, 2) @ beyond
        return _PartnerSums(
            (self.values.flatten(2) @ mixed).reshape(shape),
            gradients.reshape(walkers, 3, electrons, nuclei, size),
            (self.curvatures.flatten(2) @ beyond).reshape(shape) if self.curvatures.numel() else self.curvatures,
        )

    def summed(self, powers: Tensor) -> _PartnerSums:
        """Return ``sum_j v_ij^n u_j^m``: ``(W, n, N, A, L)``, gradients ``(W, n, 3, N, A, L)``, Laplacians; n from zero."""
        walkers, electrons, nuclei, size = powers.shape
        flat = powers.flatten(2)
        sums = (self.values.transpose(1, 2).flatten(1, 2) @ flat).reshape(walkers, POWERS + 1, electrons, nuclei, size)
        gradients = self.gradients.permute(0, 3, 1, 2, 4).flatten(1, 3) @ flat
        curvatures = self.curvatures.transpose(1, 2).flatten(1, 2) @ flat
        zero = torch.zeros_like(sums[:, :1])
        return _PartnerSums(
            sums,
            torch.cat(
                [zero[:, :, None].expand(-1, -1, 3, -1, -1, -1),
                 gradients.reshape(walkers, POWERS, 3, electrons, nuclei, size)], 1
            ),
            torch.cat([zero, curvatures.reshape(walkers, POWERS, electrons, nuclei, size)], 1),
        )  # fmt: skip


class Jastrow:
    """A Jastrow factor for one molecule.

    Args:
        centers: nuclei ``(A, 3)`` in bohr.
        elements: index of the element of each nucleus among the molecule's elements.
        spin_up: number of spin-up electrons.
        electrons: number of electrons.
        one_electron: functions of one electron.
        contraction: combinations ``(K, Q)`` of these functions, each with a parameter.
        polarising: functions of one electron whose sign depends on its spin, and their combinations ``(K, Q)``; or None.
    """

    def __init__(
        self,
        centers: Tensor,
        elements: Tensor,
        spin_up: int,
        electrons: int,
        one_electron: AtomicFunctions,
        contraction: Tensor,
        polarising: tuple[AtomicFunctions, Tensor] | None = None,
    ) -> None:
        self.centers, self.elements, self.polarising = centers, elements, polarising
        self.one_electron, self.contraction = one_electron, contraction
        self.electrons = electrons
        self.element_count = int(elements.max()) + 1
        up = torch.arange(electrons) < spin_up
        self._cusp = torch.where(up[:, None] == up[None, :], _EQUAL_SPINS, _OPPOSITE_SPINS).to(torch.float64)
        self._cusp.fill_diagonal_(0.0)
        self._signs = torch.where(up, 1.0, -1.0).to(torch.float64)
        self._others = 1.0 - torch.eye(electrons, dtype=torch.float64)
        self._terms = torch.tensor(TERMS)
        paired = electrons > 1
        self._two_center = TwoCenterTerms(centers, elements)
        self.counts = (
            self.element_count * len(TERMS) if paired else 0,
            POWERS if paired else 0,
            self._two_center.count if paired else 0,
            contraction.shape[1],
            0 if polarising is None else polarising[1].shape[1],
        )
        self.count = sum(self.counts)

    def evaluate(self, positions: Tensor, parameters: Tensor, derivatives: int = 2) -> JastrowTerms:
        """Return J with gradient and, for ``derivatives=2``, Laplacian at ``positions`` ``(W, N, 3)``."""
        three, two, bonds, one, odd = parameters.split(self.counts)
        value, gradient, laplacian = self._one_electron_terms(positions, one, odd, derivatives)
        if self.electrons == 1:
            return JastrowTerms(value, gradient, laplacian)
        distances, difference = _differences(positions)
        pair = self._pair_terms(distances, two)
        value = value + 0.5 * pair[0].sum((1, 2))
        gradient = gradient + (pair[1][..., None] * difference).sum(2)
        nuclear = self._nuclear(positions)
        blocks = _PairBlocks.of(distances, difference, self._others, derivatives)
        contracted = blocks.contracted(nuclear.powers, self._matrices(three))
        # Terms of two nuclei do not depend on the distance of the electrons: they only add to the sums over partners.
        fields = self._two_center.fields(_low_powers(nuclear.powers), bonds)
        sums = contracted.sums.clone()
        sums[..., 1:3] += fields.reshape(*sums.shape[:3], 2)
        value = value + 0.5 * (nuclear.powers * sums).sum((1, 2, 3))
        along = (nuclear.slopes * sums).sum(3)
        gradient = gradient + (along[..., None] * nuclear.away).sum(2)
        gradient = gradient + (nuclear.powers[:, None] * contracted.gradients).sum((3, 4)).transpose(1, 2)
        if derivatives >= 2:
            radial = (contracted.gradients * nuclear.away.permute(0, 3, 1, 2)[..., None]).sum(1)
            laplacian = laplacian + pair[2].sum((1, 2))
            laplacian = laplacian + (
                nuclear.laplacians * sums + 2.0 * nuclear.slopes * radial + nuclear.powers * contracted.curvatures
            ).sum((1, 2, 3))
        return JastrowTerms(value, gradient, laplacian)

    def _one_electron_terms(self, positions: Tensor, one: Tensor, odd: Tensor, derivatives: int) -> JastrowTerms:
        walkers = len(positions)
        points = positions.reshape(-1, 3)
        found = self.one_electron.evaluate(points, (self.contraction @ one)[:, None], derivatives)
        values, gradients, laplacians = found
        if self.polarising is not None:
            functions, contraction = self.polarising
            signs = self._signs.repeat(walkers)
            more = functions.evaluate(points, (contraction @ odd)[:, None], derivatives)
            values, gradients = values + signs * more.values, gradients + signs * more.gradients
            laplacians = laplacians + signs * more.laplacians if derivatives >= 2 else laplacians
        value = values.reshape(walkers, -1).sum(1)
        return JastrowTerms(
            value,
            gradients.reshape(3, walkers, -1).permute(1, 2, 0),
            laplacians.reshape(walkers, -1).sum(1) if derivatives >= 2 else torch.zeros_like(value),
        )

    def parameter_derivatives(self, positions: Tensor, velocities: Tensor) -> JastrowDerivatives:
        """Return every term, and the operator ``sum_i lap_i + 2 v_i . grad_i`` on it.

        Args:
            positions: positions ``(W, N, 3)``.
            velocities: gradients v of ln|Psi|, of the same shape.
        """
        values, operated = [], []
        parts = [(self.one_electron, self.contraction, torch.ones_like(self._signs))]
        if self.polarising is not None:
            parts.append((*self.polarising, self._signs))
        for functions, contraction, signs in parts:
            found = functions.evaluate(positions.reshape(-1, 3), contraction, 2)
            flow = torch.einsum("ckp,pc->kp", found.gradients, velocities.reshape(-1, 3))
            shape = (contraction.shape[1], len(positions), self.electrons)
            values.append((found.values.reshape(shape) @ signs).T)
            operated.append(((found.laplacians + 2.0 * flow).reshape(shape) @ signs).T)
        if self.electrons > 1:
            distances, difference = _differences(positions)
            nuclear = self._nuclear(positions)
            partners = _PairBlocks.of(distances, difference, self._others, 2).summed(nuclear.powers)
            three = self._three_body_derivatives(nuclear, partners, velocities)
            two = self._two_body_derivatives(distances, difference, velocities)
            speed = torch.einsum("wiac,wic->wia", nuclear.away, velocities)[..., None]
            bonds = self._two_center.derivatives(
                _low_powers(nuclear.powers), _low_powers(nuclear.laplacians + 2.0 * nuclear.slopes * speed)
            )
            values = [three.values, two.values, bonds[0], *values]
            operated = [three.operated, two.operated, bonds[1], *operated]
        return JastrowDerivatives(torch.cat(values, 1), torch.cat(operated, 1))

    def spin_terms(self, positions: Tensor, parameters: Tensor, down: Tensor) -> Tensor:
        """Return the part of J that depends on the spins ``(W, A)``.

        Args:
            positions: positions ``(W, N, 3)``.
            parameters: parameters of J.
            down: masks ``(W, A, N)`` of the electrons with spin down, in A distributions.
        """
        i, j = torch.triu_indices(self.electrons, self.electrons, 1)
        distances = torch.linalg.vector_norm(positions[:, i] - positions[:, j], dim=2)
        strengths = torch.where(down[:, :, i] == down[:, :, j], _EQUAL_SPINS, _OPPOSITE_SPINS)
        result = (strengths * (distances / (1.0 + distances))[:, None]).sum(2)
        if self.polarising is not None:
            functions, contraction = self.polarising
            odd = parameters.split(self.counts)[-1]
            values = functions.evaluate(positions.reshape(-1, 3), (contraction @ odd)[:, None]).values
            signs = torch.where(down, -1.0, 1.0).to(values.dtype)
            result = result + (signs * values.reshape(len(positions), 1, -1)).sum(2)
        return result

    def _matrices(self, three: Tensor) -> Tensor:
        """Return the parameters as symmetric matrices ``(A, n, L, L)``."""
        matrices = torch.zeros(self.element_count, POWERS + 1, POWERS + 1, POWERS + 1, dtype=torch.float64)
        left, right, pair = self._terms.T
        table = three.reshape(self.element_count, -1)
        matrices[:, pair, left, right] += table
        matrices[:, pair, right, left] += table
        return matrices[self.elements]

    def _pair_terms(self, distances: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return value, slope over r and Laplacian by one electron of all terms of pairs, ``(W, N, N)`` each."""
        scaled = 1.0 / (1.0 + distances)
        inverse = self._others / distances
        value = self._cusp * distances * scaled
        slope = self._cusp * scaled**2 * inverse
        laplacian = 2.0 * self._cusp * scaled**3 * inverse
        powers = _pair_powers(distances)
        for n in range(1, POWERS + 1):
            factor = two[n - 1] * self._others
            value = value + factor * powers[0][n]
            slope = slope + factor * powers[1][n]
            laplacian = laplacian + factor * powers[2][n]
        return value, slope, laplacian

    def _nuclear(self, positions: Tensor) -> _Nuclear:
        away = positions[:, :, None] - self.centers
        square = away.square().sum(3)
        u = 1.0 / (1.0 + 0.5 * square)
        powers = torch.stack([torch.ones_like(u), u, u * u, u * u * u], 3)
        orders = torch.arange(POWERS + 1, dtype=torch.float64)
        slopes = -orders * powers * u[..., None]
        # lap u^l = l (l + 1) r^2 u^(l + 2) - 3 l u^(l + 1)
        return _Nuclear(powers, slopes, -slopes * ((orders + 1.0) * (square * u)[..., None] - 3.0), away)

    def _three_body_derivatives(
        self, nuclear: _Nuclear, partners: _PartnerSums, velocities: Tensor
    ) -> JastrowDerivatives:
        shape = (len(velocities), self.element_count, len(TERMS))
        values, operated = velocities.new_zeros(shape), velocities.new_zeros(shape)
        speed = torch.einsum("wiac,wic->wia", nuclear.away, velocities)[..., None]
        # The operator on u^l alone, on the sum over partners alone, and the product of both gradients.
        on_powers = nuclear.laplacians + 2.0 * nuclear.slopes * speed
        on_sums = partners.curvatures + 2.0 * torch.einsum("wnciam,wic->wniam", partners.gradients, velocities)
        radial = torch.einsum("wnciam,wiac->wniam", partners.gradients, nuclear.away)
        for k, (left, right, pair) in enumerate(TERMS):
            value = (nuclear.powers[..., left] * partners.sums[:, pair, ..., right]).sum(1)
            total = torch.zeros_like(value)
            for first, second in ((left, right), (right, left)):
                total = total + (
                    on_powers[..., first] * partners.sums[:, pair, ..., second]
                    + 2.0 * nuclear.slopes[..., first] * radial[:, pair, ..., second]
                    + nuclear.powers[..., first] * on_sums[:, pair, ..., second]
                ).sum(1)
            values[:, :, k].index_add_(1, self.elements, value)
            operated[:, :, k].index_add_(1, self.elements, total)
        return JastrowDerivatives(values.flatten(1), operated.flatten(1))

    def _two_body_derivatives(self, distances: Tensor, difference: Tensor, velocities: Tensor) -> JastrowDerivatives:
        powers, slopes, laplacians = _pair_powers(distances)
        speed = (difference * velocities[:, :, None]).sum(3)
        values, operated = [], []
        for n in range(1, POWERS + 1):
            values.append(0.5 * (self._others * powers[n]).sum((1, 2)))
            operated.append((self._others * (laplacians[n] + 2.0 * slopes[n] * speed)).sum((1, 2)))
        return JastrowDerivatives(torch.stack(values, 1), torch.stack(operated, 1))


def _low_powers(powers: Tensor) -> Tensor:
    """Return the first and second of ``(W, N, A, L)``, ``(W, N, 2 A)``."""
    return powers[..., 1:3].flatten(2)


def _differences(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances ``(W, N, N)``, one on the diagonal, and ``r_i - r_j`` ``(W, N, N, 3)``."""
    difference = positions[:, :, None] - positions[:, None]
    distances = difference.square().sum(3).sqrt()
    return distances + torch.eye(positions.shape[1], dtype=positions.dtype), difference


def _pair_powers(distances: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return ``v^n``, its slope over r and its Laplacian for n from 0, ``v = r^2/(1 + r^2)``."""
    square = distances.square()
    rest = 1.0 / (1.0 + square)  # 1 - v
    v = square * rest
    values, slopes, laplacians = [torch.ones_like(v)], [torch.zeros_like(v)], [torch.zeros_like(v)]
    for n in range(1, POWERS + 1):
        below = values[n - 1]
        first = n * below * rest**2  # by r^2
        second = (n * (n - 1) * (values[n - 2] if n > 1 else below) * rest - 2.0 * n * below) * rest**3
        slopes.append(2.0 * first)
        laplacians.append(4.0 * square * second + 6.0 * first)
        values.append(below * v)
    return values, slopes, laplacians
