"""The molecule builder: an exact density over molecules of a formula, atom by atom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.model import Model
from .configuration import BuilderConfiguration
from .formulas import ATOMIC_NUMBERS, ELEMENTS, Formula
from .molecule_sets import MoleculeSet
from .network import PlacementNetwork
from .partial_molecules import PartialMolecules, Placements, frames_at
from .training.isomer_energies import IsomerEnergies

_HYDROGEN = ELEMENTS.index("H")
_NUMBERS = torch.tensor([ATOMIC_NUMBERS[symbol] for symbol in ELEMENTS])


class BuiltMolecules(NamedTuple):
    """Molecules and how they were built.

    Attributes:
        positions: ``(B, N, 3)`` in nm, rows in the order of building; rows of no atom are zero.
        elements: ``(B, N)``, indices into ``ELEMENTS``.
        counts: ``(B,)``, atoms of each.
        placements: of rows 1 and up; each field ``(B, N)``, entry 0 has no meaning.
        log_probs: ``(B, N)``, of each step's choices (element alone for the first row); zero for rows of no atom.
    """

    positions: Tensor
    elements: Tensor
    counts: Tensor
    placements: Placements
    log_probs: Tensor

    def molecule(self, index: int) -> tuple[Tensor, Tensor]:
        """Return atomic numbers ``(n,)`` and positions ``(n, 3)`` in nm of one molecule."""
        count = int(self.counts[index])
        return _NUMBERS[self.elements[index, :count]], self.positions[index, :count]


class MoleculeBuilder(Model):
    """Places the atoms of a formula one by one: which atom to attach to, element, distance, angle, torsion.

    The density of a molecule along a build order is exact: that of positions relative to the first atom, in nm to the power of
    -3(N-1), with all orientations alike; the sum over the atoms that each atom could have been attached to is taken. It is
    invariant under rotations, translations and reflections. Hydrogen is placed after everything else. Stoichiometry holds by
    masks: an element is chosen among those left in the bag.
    """

    kind: ClassVar[str] = "molecule_builder"
    description: ClassVar[str] = "a builder of molecules, which places atoms and has no energy of positions"

    def __init__(self, configuration: BuilderConfiguration | None = None) -> None:
        super().__init__()
        self.settings = configuration or BuilderConfiguration()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.network = PlacementNetwork(self.settings)
        self.energies = IsomerEnergies(self.settings.energy_features) if self.settings.energy_features else None

    def carry(self, energies: IsomerEnergies) -> None:
        """Take along what is known of energies; it has no part in the density, and says which molecules to evaluate first."""
        self.settings = self.settings.model_copy(update={"energy_features": energies.features})
        self.energies = energies if energies.features else None

    def sample(self, formula: str | Formula | Sequence[Formula], n: int, generator: torch.Generator) -> BuiltMolecules:
        """Build molecules.

        Args:
            formula: of all molecules, or one for each.
            n: number of molecules.
            generator: of all random numbers.

        Raises:
            ConfigurationError: for a formula that no molecule has, and for less than one molecule.
        """
        if n < 1:
            raise ConfigurationError(f"the number of molecules must be positive, got {n}")
        formulas = self._formulas(formula, n)
        with torch.no_grad():
            return self._build(torch.tensor([f.counts for f in formulas]), generator)

    def _formulas(self, formula: str | Formula | Sequence[Formula], n: int) -> list[Formula]:
        if isinstance(formula, str):
            formula = Formula.parse(formula)
        formulas = [formula] * n if isinstance(formula, Formula) else list(formula)
        if len(formulas) != n:
            raise ConfigurationError(f"{len(formulas)} formulas for {n} molecules: give one, or as many as molecules")
        for each in formulas:
            each.require_possible()
        return formulas

    def _build(self, bag: Tensor, generator: torch.Generator) -> BuiltMolecules:
        counts = bag.sum(1)
        size, most = len(bag), int(counts.max())
        positions = torch.zeros(size, most, 3, dtype=torch.float64)
        elements = torch.zeros(size, most, dtype=torch.long)
        choices = Placements(
            torch.zeros_like(elements), torch.zeros_like(elements), *torch.zeros(3, size, most, dtype=torch.float64)
        )
        choices.distance.fill_(0.1)  # in the first entry, which means nothing, a number whose logarithm is finite
        log_probs = torch.zeros(size, most, dtype=torch.float64)
        placed = torch.zeros(size, most, dtype=torch.bool)
        for step in range(most):
            busy = torch.nonzero(counts > step).squeeze(1)
            state = PartialMolecules(positions, elements, placed, bag).select(busy).first_rows(max(step, 1))
            if step == 0:
                logits = masked_elements(self.network.first_logits(state), state.bag)
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
                log_probs[busy, 0] = logits.log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
            else:
                placement, place, log_prob = self._draw(state, generator)
                positions[busy, step] = place
                log_probs[busy, step] = log_prob
                chosen = placement.element
                for target, value in zip(choices, placement, strict=True):
                    target[busy, step] = value
            elements[busy, step] = chosen
            placed[busy, step] = True
            bag = bag.index_put((busy, chosen), torch.tensor(-1), accumulate=True)
        return BuiltMolecules(positions, elements, counts, choices, log_probs)

    def _draw(self, state: PartialMolecules, generator: torch.Generator) -> tuple[Placements, Tensor, Tensor]:
        """Return choices, the position ``(B, 3)`` they lead to, and their log-probability ``(B,)``."""
        network, rows = self.network, torch.arange(state.size)
        features = network.features(state)
        focus_logits = network.focus_logits(features, state).double()
        focus = torch.multinomial(focus_logits.softmax(-1), 1, generator=generator).squeeze(1)
        at_focus = features[rows, focus]
        element_logits = masked_elements(network.element_logits(at_focus), state.bag)
        element = torch.multinomial(element_logits.softmax(-1), 1, generator=generator).squeeze(1)
        frames = frames_at(state, focus)
        distances = network.distance_density(at_focus, element)
        distance = distances.sample(generator)
        several = state.placed.sum(1) > 1
        cosines = network.cosine_density(features, frames, focus, element, distance)
        uniform = 2.0 * torch.rand(state.size, generator=generator, dtype=torch.float64) - 1.0
        cosine = torch.where(several, cosines.sample(generator), uniform)
        torsions = network.torsion_density(features, state, frames, focus, element, distance, cosine)
        turn = 2.0 * math.pi * torch.rand(state.size, generator=generator, dtype=torch.float64)
        torsion = torch.where(frames.has_torsion, torsions.sample(generator), turn)
        placement = Placements(focus, element, distance, cosine, torsion)
        log_prob = (
            focus_logits.log_softmax(-1)[rows, focus]
            + element_logits.log_softmax(-1)[rows, element]
            + distances.log_prob(distance)
            + torch.where(several, cosines.log_prob(cosine), -math.log(2.0))
            + torch.where(frames.has_torsion, torsions.log_prob(torsion), -math.log(2.0 * math.pi))
        )
        return placement, frames.place(distance, cosine, torsion), log_prob

    def choice_log_probs(self, state: PartialMolecules, placements: Placements) -> Tensor:
        """Return log-probabilities ``(B,)`` of choices (focus, element, distance, cosine, torsion) in each state.

        They are densities in the choices themselves; divided by the square of the distance, in positions. A state in which
        nothing is placed takes the element alone.
        """
        return self.choice_parts(state, placements).sum(0)

    def choice_parts(self, state: PartialMolecules, placements: Placements) -> Tensor:
        """Return the five terms of :meth:`choice_log_probs`, ``(5, B)``."""
        network, rows = self.network, torch.arange(state.size)
        empty = ~state.placed[:, 0]
        features = network.features(state)
        focus, element, distance, cosine, torsion = placements
        at_focus = features[rows, focus]
        focus_logits = torch.where(empty.unsqueeze(1), 0.0, network.focus_logits(features, state).double())
        raw = torch.where(empty.unsqueeze(1), network.first_logits(state), network.element_logits(at_focus))
        elements = masked_elements(raw, state.bag).log_softmax(-1)[rows, element]
        frames = frames_at(state, focus)
        distances = network.distance_density(at_focus, element).log_prob(distance)
        cosines = network.cosine_density(features, frames, focus, element, distance).log_prob(cosine)
        torsions = network.torsion_density(features, state, frames, focus, element, distance, cosine).log_prob(torsion)
        several = state.placed.sum(1) > 1
        return torch.stack(
            [
                torch.where(empty, 0.0, focus_logits.log_softmax(-1)[rows, focus]),
                elements,
                torch.where(empty, 0.0, distances),
                torch.where(empty, 0.0, torch.where(several, cosines, -math.log(2.0))),
                torch.where(empty, 0.0, torch.where(frames.has_torsion, torsions, -math.log(2.0 * math.pi))),
            ]
        )

    def log_prob(self, molecules: MoleculeSet, orders: Tensor | None = None) -> Tensor:
        """Return the log-density ``(B,)`` of molecules along build orders, exact; minus infinity for an order not taken here.

        It is the density of the positions ``(n, 3)`` in nm relative to the first atom, in which the sum over all atoms that
        each could have been attached to is taken.

        Args:
            molecules: B of them.
            orders: ``(B, N)``, rows in the order of building, rows of no atom last; by default as they stand.
        """
        if orders is not None:
            molecules = molecules.permuted(orders)
        total = torch.zeros(len(molecules.counts), dtype=torch.float64)
        for step in range(int(molecules.counts.max())):
            busy = torch.nonzero(molecules.counts > step).squeeze(1)
            part = molecules.select(busy)
            state = part.states(torch.full_like(busy, step))
            total = total.index_add(0, busy, self._step_log_density(part, state, step))
        return total

    def _step_log_density(self, molecules: MoleculeSet, state: PartialMolecules, step: int) -> Tensor:
        """Return the log-density ``(B,)`` of element and position of one row, given the rows before."""
        batch, foci = state.size, max(step, 1)
        # One copy of each state for each atom that the new one may be attached to.
        rows = torch.arange(batch).repeat_interleave(foci)
        copies, steps = state.select(rows), torch.full((batch * foci,), step)
        placements = molecules.select(rows).placements(steps, copies, torch.arange(foci).repeat(batch))
        choices = self.choice_log_probs(copies, placements)
        if step == 0:
            return choices
        return torch.logsumexp((choices - 2.0 * placements.distance.log()).view(batch, foci), 1)

    def estimate_log_prob(
        self, molecules: MoleculeSet, orders: int, generator: torch.Generator, jumps: float = 0.1
    ) -> Tensor:
        """Return the logarithm ``(B,)`` of an unbiased estimate of the density of molecules, whatever order they are built in.

        The density is the sum of :meth:`log_prob` over all orders; the estimate is the mean of its terms for random orders,
        each divided by the probability to draw it.

        Args:
            molecules: B of them.
            orders: random orders for each.
            generator: of the orders.
            jumps: see :meth:`MoleculeSet.draw_orders`; with none the estimate is of the orders in which all is bonded.
        """
        terms = []
        for _ in range(orders):
            drawn = molecules.draw_orders(generator, jumps)
            terms.append(self.log_prob(molecules, drawn.rows) - drawn.log_probs)
        return torch.logsumexp(torch.stack(terms), 0) - math.log(orders)

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
        return self.settings.model_dump(mode="json")

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Model.from_configuration`."""
        return cls(BuilderConfiguration.model_validate(configuration))


def masked_elements(logits: Tensor, bag: Tensor) -> Tensor:
    """Return logits ``(B, E)`` in float64 with minus infinity for what the bag lacks, and for hydrogen before its turn."""
    allowed = bag > 0
    heavy = allowed.clone()
    heavy[:, _HYDROGEN] = False
    allowed = torch.where(heavy.any(1, keepdim=True), heavy, allowed)
    return logits.double().masked_fill(~allowed, -torch.inf)
