"""A graph network of beads that knows types and distances only, so that one set of parameters serves other sequences.

Continuous-filter convolutions of SchNet (Schuett et al., J. Chem. Phys. 148, 241722 (2018)), as Husic et al. (J. Chem.
Phys. 153, 194101 (2020)) use them for coarse-graining. All pairs of beads are neighbours with a smooth cutoff: molecules
are small, and shapes stay fixed, which compilation asks for. A distance-based energy does not tell mirror images apart: the
prior's torsions do.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ..beads.geometry import distances


class GraphConfiguration(StrictModel):
    """Sizes of the graph network.

    Attributes:
        types: ``residues``: a bead's type is its residue and name; ``names``: its name alone.
        vocabulary: all types that the network knows; empty for those of the beads it is built for. Networks that are to be
            transferred list more.
        width: length of the vector of a bead.
        filters: Gaussians of the distance.
        interactions: rounds of messages.
        cutoff: nm, where the influence of a neighbour ends.
        seed: random seed of the initial parameters.
    """

    kind: Literal["graph"] = "graph"
    types: Literal["residues", "names"] = "residues"
    vocabulary: tuple[str, ...] = ()
    width: PositiveInt = 64
    filters: PositiveInt = 32
    interactions: PositiveInt = 2
    cutoff: PositiveFloat = 1.5
    seed: int = 0


def bead_types(beads: Particles, configuration: GraphConfiguration) -> list[str]:
    """Return the type of each bead."""
    if configuration.types == "names":
        return list(beads.names)
    return [f"{residue}:{name}" for residue, name in zip(beads.residue_names, beads.names, strict=True)]


class GraphNetwork(nn.Module):
    """Energies of bead configurations in units of kT, from types and distances.

    Args:
        beads: beads with their names and residues.
        configuration: sizes.

    Raises:
        ConfigurationError: for a bead whose type is not in the vocabulary.
    """

    types: Tensor
    pairs: Tensor
    centres: Tensor

    def __init__(self, beads: Particles, configuration: GraphConfiguration) -> None:
        super().__init__()
        names = bead_types(beads, configuration)
        vocabulary = list(configuration.vocabulary) or sorted(set(names))
        unknown = sorted(set(names) - set(vocabulary))
        if unknown:
            raise ConfigurationError(
                f"the network does not know beads of type {', '.join(unknown)}, it was made for {', '.join(vocabulary)}: train "
                "one whose vocabulary holds them"
            )
        self.vocabulary = tuple(vocabulary)
        self.configuration = configuration.model_copy(update={"vocabulary": self.vocabulary})
        self.beads, self.cutoff, width = len(beads), configuration.cutoff, configuration.width
        self.register_buffer("types", torch.tensor([vocabulary.index(name) for name in names]), persistent=False)
        full = [(i, j) for i in range(len(beads)) for j in range(len(beads)) if i != j]
        self.register_buffer("pairs", torch.tensor(full), persistent=False)
        centres = torch.linspace(0.0, configuration.cutoff, configuration.filters, dtype=torch.float64)
        self.register_buffer("centres", centres, persistent=False)
        self.spacing = configuration.cutoff / max(configuration.filters - 1, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(configuration.seed)
            self.embedding = nn.Embedding(len(vocabulary), width)
            self.messages = nn.ModuleList(
                _Interaction(width, configuration.filters) for _ in range(configuration.interactions)
            )
            self.output = nn.Sequential(nn.Linear(width, width // 2 or 1), nn.SiLU(), nn.Linear(width // 2 or 1, 1))

    def serving(self, beads: Particles) -> GraphNetwork:
        """Return the network for other beads; its parameters are these, not copies.

        Raises ConfigurationError for a bead whose type is not in the vocabulary.
        """
        other = GraphNetwork(beads, self.configuration)
        other.embedding, other.messages, other.output = self.embedding, self.messages, self.output
        return other

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies ``(B,)`` in kT of positions ``(B, n, 3)`` in nm, in the dtype of the positions."""
        batch = len(positions)
        apart = distances(positions, self.pairs)
        scaled = (apart.unsqueeze(-1) - self.centres.to(apart.dtype)) / self.spacing
        gaussians = torch.exp(-0.5 * scaled.square())
        reduced = apart.clamp(max=self.cutoff) / self.cutoff
        envelope = 0.5 * (torch.cos(math.pi * reduced) + 1.0)
        x = self.embedding(self.types).expand(batch, -1, -1).to(apart.dtype)
        for message in self.messages:
            x = x + message(x, gaussians, envelope, self.beads)
        energy: Tensor = self.output(x).sum((-1, -2))
        return energy


class _Interaction(nn.Module):
    """One round of messages: vectors of neighbours times a filter of the distance, summed and transformed for each bead."""

    def __init__(self, width: int, filters: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(filters, width), nn.SiLU(), nn.Linear(width, width))
        self.inwards = nn.Linear(width, width, bias=False)
        self.digest = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, gaussians: Tensor, envelope: Tensor, beads: int) -> Tensor:
        weights = self.filter(gaussians) * envelope.unsqueeze(-1)
        sent = self.inwards(x)
        # Pairs are ordered by receiver, beads - 1 senders each; the senders are all others.
        batch, _, width = sent.shape
        others = torch.stack([torch.cat([sent[:, :i], sent[:, i + 1 :]], 1) for i in range(beads)], 1)
        received = (others * weights.reshape(batch, beads, beads - 1, width)).sum(2)
        digested: Tensor = self.digest(functional.silu(received))
        return digested
