"""Prior energies of coarse-grained force fields: closed forms that keep beads where there are training data.

Each term is a module that maps positions to energies; :class:`PriorEnergy` puts terms together as a Potential of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.potential import Particles, Potential, PotentialMetadata
from .beads.geometry import angles, distances, torsion_cosines


class PriorTerm(nn.Module):
    """A sum of equal functions of a few beads each.

    Attributes:
        beads: indices of the beads of each function ``(M, K)``.
        parameters_of: names of the buffers with one value (or row) for each function.
    """

    beads: Tensor
    kind: ClassVar[str]
    beads_of_one: ClassVar[int]
    parameter_names: ClassVar[tuple[str, ...]]

    def __init__(self, beads: Any, **values: Any) -> None:
        super().__init__()
        indices = torch.as_tensor(beads, dtype=torch.long).reshape(-1, self.beads_of_one)
        self.register_buffer("beads", indices)
        for name in self.parameter_names:
            value = torch.as_tensor(values[name], dtype=torch.float64)
            if len(value) != len(indices):
                raise ConfigurationError(f"{len(value)} {name} for {len(indices)} {self.kind}")
            if not bool(torch.isfinite(value).all()):
                raise ConfigurationError(f"{name} of {self.kind} must be finite numbers")
            self.register_buffer(name, value)

    def each(self, positions: Tensor) -> Tensor:
        """Return the energy of each function ``(B, M)`` in kJ/mol at positions ``(B, N, 3)`` in nm, float64."""
        raise TypeError(f"{type(self).__name__} defines no energy: write its each(positions)")

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol."""
        return self.each(positions).sum(-1)

    def shape(self) -> dict[str, Any]:
        """Return the arguments of :func:`empty_term` for a term of the same shape."""
        return {"kind": self.kind, "count": len(self.beads)}


class HarmonicBonds(PriorTerm):
    """``k/2 (b - b0)^2``: lengths b0 in nm, stiffnesses k in kJ/mol/nm^2."""

    kind = "bonds"
    beads_of_one = 2
    parameter_names = ("lengths", "stiffness")
    lengths: Tensor
    stiffness: Tensor

    def each(self, positions: Tensor) -> Tensor:
        return _harmonic(distances(positions, self.beads) - self.lengths, self.stiffness)


class MorseBonds(PriorTerm):
    """``D (1 - exp(-a (b - b0)))^2``: depths D in kJ/mol, widths a in 1/nm, lengths b0 in nm. Its bonds can break."""

    kind = "morse_bonds"
    beads_of_one = 2
    parameter_names = ("lengths", "depths", "widths")
    lengths: Tensor
    depths: Tensor
    widths: Tensor

    def each(self, positions: Tensor) -> Tensor:
        stretch = distances(positions, self.beads) - self.lengths
        return self.depths * (1.0 - torch.exp(-self.widths * stretch)).square()


class HarmonicAngles(PriorTerm):
    """``k/2 (a - a0)^2``: angles a0 in radians, stiffnesses k in kJ/mol/rad^2."""

    kind = "angles"
    beads_of_one = 3
    parameter_names = ("centres", "stiffness")
    centres: Tensor
    stiffness: Tensor

    def each(self, positions: Tensor) -> Tensor:
        return _harmonic(angles(positions, self.beads) - self.centres, self.stiffness)


class FourierTorsions(PriorTerm):
    """``sum_n c_n cos(n t) + s_n sin(n t)``, n = 1 .. H: coefficients ``(M, H)`` in kJ/mol."""

    kind = "torsions"
    beads_of_one = 4
    parameter_names = ("cosines", "sines")
    cosines: Tensor
    sines: Tensor

    def each(self, positions: Tensor) -> Tensor:
        cosine, sine = torsion_cosines(positions, self.beads)
        c, s = cosine, sine
        energy = self.cosines[:, 0] * c + self.sines[:, 0] * s
        for n in range(1, self.cosines.shape[1]):
            c, s = c * cosine - s * sine, s * cosine + c * sine  # of one angle more
            energy = energy + self.cosines[:, n] * c + self.sines[:, n] * s
        return energy

    def shape(self) -> dict[str, Any]:
        return {**super().shape(), "harmonics": self.cosines.shape[1]}


class ExcludedVolume(PriorTerm):
    """``k/2 (d - d0)^2`` where a distance d is below d0, zero elsewhere: d0 in nm, k in kJ/mol/nm^2."""

    kind = "repulsion"
    beads_of_one = 2
    parameter_names = ("ranges", "stiffness")
    ranges: Tensor
    stiffness: Tensor

    def each(self, positions: Tensor) -> Tensor:
        return _harmonic((self.ranges - distances(positions, self.beads)).clamp_min(0.0), self.stiffness)


def _harmonic(displacement: Tensor, stiffness: Tensor) -> Tensor:
    return 0.5 * stiffness * displacement.square()


TERMS: dict[str, type[PriorTerm]] = {
    term.kind: term for term in (HarmonicBonds, MorseBonds, HarmonicAngles, FourierTorsions, ExcludedVolume)
}


def empty_term(shape: dict[str, Any]) -> PriorTerm:
    """Return a term of a stored shape, to be filled by ``load_state_dict``."""
    kind, count = shape["kind"], int(shape["count"])
    if kind not in TERMS:
        raise ConfigurationError(f"the prior term {kind!r} is not known here: one of {', '.join(TERMS)}")
    term = TERMS[kind]
    size = (count, int(shape["harmonics"])) if kind == FourierTorsions.kind else (count,)
    return term(torch.zeros(count, term.beads_of_one), **{name: torch.zeros(size) for name in term.parameter_names})


class PriorEnergy(Potential):
    """A sum of prior terms, as a Potential that can be saved and run on its own.

    Args:
        beads: the particles.
        terms: terms of the energy, in any order.
        temperature: K at which they were fitted; None for terms that were not.
    """

    kind: ClassVar[str] = "coarse_grained_prior"
    description: ClassVar[str] = "a coarse-grained prior of one molecule"

    def __init__(self, beads: Particles, terms: list[PriorTerm], temperature: float | None) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(beads, temperature=temperature)
        for term in terms:
            if len(term.beads) and int(term.beads.max()) >= len(beads):
                raise ConfigurationError(f"{term.kind} name bead {int(term.beads.max())} of {len(beads)}")
        self.terms = nn.ModuleList(terms)

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol; see :meth:`Potential.forward`. There is no periodic box."""
        self.check_arguments(cell, global_parameters)
        positions = positions.double()
        energy = (0.0 * positions).sum((1, 2))  # a function of the positions also where there is no term
        for term in self.terms:
            energy = energy + term(positions)
        return energy

    @property
    def prior_terms(self) -> list[PriorTerm]:
        """The terms, typed."""
        return [term for term in self.terms if isinstance(term, PriorTerm)]

    def term(self, kind: str) -> PriorTerm | None:
        """Return the first term of a kind, None where there is none."""
        return next((term for term in self.prior_terms if term.kind == kind), None)

    def configuration(self) -> dict[str, Any]:
        return {
            "beads": self.metadata.particles.to_dict(),
            "temperature": self.metadata.temperature,
            "terms": [term.shape() for term in self.prior_terms],
        }

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        temperature = configuration["temperature"]
        return cls(
            Particles.from_dict(configuration["beads"]),
            [empty_term(shape) for shape in configuration["terms"]],
            None if temperature is None else float(temperature),
        )
