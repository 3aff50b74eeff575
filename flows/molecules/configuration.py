"""The sizes of a molecule builder, as stored in model files."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from ...core.configuration import StrictModel


class BuilderConfiguration(StrictModel):
    """An autoregressive builder.

    Attributes:
        width: features of an atom.
        layers: layers of message passing over the partial molecule.
        radial: Gaussian functions of a distance.
        radial_range: nm, of the first and the last of them. The first is near zero: places that are taken must be seen.
        channels: features of a neighbour that are summed for each radial function.
        components: components of the mixtures for distances and angles.
        torsions: centres of the mixture for torsions, evenly spread over the circle.
        seed: random seed of the initial parameters.
        energy_features: parts of graphs whose energies the builder carries along, see
            :class:`~flowbridge.flows.molecules.training.isomer_energies.IsomerEnergies`; none where it knows no energies.
    """

    width: PositiveInt = 96
    layers: PositiveInt = 3
    radial: PositiveInt = 22
    radial_range: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.545)
    channels: PositiveInt = 16
    components: PositiveInt = 8
    torsions: PositiveInt = Field(default=36, ge=4)
    seed: int = 0
    energy_features: tuple[str, ...] = ()
