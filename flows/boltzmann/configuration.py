"""The architecture of a flow, in the TOML file and in the model file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ...core.configuration import StrictModel
from ..transforms.registry import TRANSFORMS, Domain, find_transform


class TorsionChainConfiguration(StrictModel):
    """The flow of the circular coordinates: smooth circular bump mixtures (arXiv 2110.00351).

    Attributes:
        couplings: coupling layers that alternate between two halves of the torsions.
        components: bumps of one mixture.
        hidden: widths of the hidden layers of the conditioners.
        harmonics: conditioners see cos and sin of k times each torsion, k = 1 .. harmonics.
        minimum_width: smallest support of a bump in turns; bounds how sharp the density, hence the force, can be.
        learn_steepness: let the conditioner choose the steepness of each bump.
        rotors_last: give torsions that only turn hydrogens (methyl groups) one layer each, after the others.
    """

    couplings: PositiveInt = 6
    components: PositiveInt = 16
    hidden: tuple[PositiveInt, ...] = (64, 64)
    harmonics: PositiveInt = 3
    minimum_width: float = Field(default=0.06, gt=0.0, lt=1.0)
    learn_steepness: bool = True
    rotors_last: bool = True


class StiffChainConfiguration(StrictModel):
    """The flow of bonds, angles and stiff torsions, conditioned on the circular ones.

    Attributes:
        map: ``whitened``: subtract a regression on torsion features and whiten, latent space normal; ``interval``: each
            coordinate by the distribution function of a truncated normal to [0, 1], latent space uniform (the paper's).
        transform: name in :mod:`flowbridge.flows.transforms.registry`: ``affine`` or ``sinh_arcsinh`` (whitened), ``bumps``
            (interval).
        couplings: number of coupling layers.
        hidden: widths of the hidden layers of the conditioners.
        components: bumps of one mixture (``bumps`` only).
        mixing: ``rank_one`` puts linear layers between the couplings, trained by merged perturbations of rank one (P4, arXiv
            2010.07033), which start as the identity; ``none`` leaves the mixing to the splits.
        split: ``random`` halves, or ``angles_then_bonds``: angles given torsions in alternating halves, then bonds given
            both (the paper's).
        harmonics: conditioners see cos and sin of k times each circular torsion, k = 1 .. harmonics.
    """

    map: Literal["whitened", "interval"] = "whitened"
    transform: str = "sinh_arcsinh"
    couplings: NonNegativeInt = 8
    hidden: tuple[PositiveInt, ...] = (128, 128)
    components: PositiveInt = 8
    mixing: Literal["none", "rank_one"] = "none"
    split: Literal["random", "angles_then_bonds"] = "random"
    harmonics: PositiveInt = 3

    @model_validator(mode="after")
    def _parts_fit(self) -> StiffChainConfiguration:
        domain: Domain = "interval" if self.map == "interval" else "line"
        if find_transform(self.transform).domain != domain:
            fitting = [name for name, registered in TRANSFORMS.items() if registered.domain == domain]
            raise ValueError(
                f"map = {self.map!r} and transform = {self.transform!r} do not fit: {self.map} coordinates are for "
                f"{' or '.join(fitting)}"
            )
        if self.mixing != "none" and (self.map == "interval" or self.split != "random"):
            raise ValueError(
                f"mixing = {self.mixing!r} adds coordinates up: it needs map = 'whitened' (an interval has no sums), and "
                f"split = 'random' (in 'angles_then_bonds' angles may not know of bonds); got {self.map!r}, {self.split!r}"
            )
        return self


class FlowConfiguration(StrictModel):
    """A flow on internal coordinates.

    Attributes:
        circular: which torsions are circular: ``soft``, those that the training data show to be spread or to have
            several wells, or ``all``, as in the paper.
        torsions: the flow of the circular coordinates.
        stiff: the flow of the rest.
        seed: random seed of the initial parameters and of the random splits.
    """

    circular: Literal["soft", "all"] = "soft"
    torsions: TorsionChainConfiguration = Field(default_factory=TorsionChainConfiguration)
    stiff: StiffChainConfiguration = Field(default_factory=StiffChainConfiguration)
    seed: int = 0
