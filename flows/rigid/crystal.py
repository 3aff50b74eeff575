"""Coordinates of labelled bodies about the sites and orientations of a crystal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from .bodies import BodyConfiguration
from .maps.quaternions import checked_orientations, conjugate, from_chart, product, to_chart


class CrystalCoordinates(NamedTuple):
    """Positions and orientations of bodies relative to the crystal.

    Attributes:
        displacements: ``(B, M, 3)`` nm from the sites, in a frame that moves with the first body; zero for that one.
        orientations: ``(B, M, 4)`` unit quaternions in the frames of the sites' orientations; the identity, of either
            sign, for a body that is oriented as its site.
    """

    displacements: Tensor
    orientations: Tensor


class RigidMapResult(NamedTuple):
    """Mapped coordinates and ``log |det|`` ``(B,)`` of the map, by volumes of positions and shares of orientations."""

    value: CrystalCoordinates
    log_det: Tensor


class RigidBijection(nn.Module):
    """An invertible map of crystal coordinates; it leaves the displacement of the first body zero.

    ``forward`` goes latent -> data, ``inverse`` data -> latent, and the log-determinant belongs to the direction asked for.
    """

    def forward(self, value: CrystalCoordinates) -> RigidMapResult:
        """Map latent to data."""
        raise TypeError(f"{type(self).__name__} defines no forward (latent to data) map")

    def inverse(self, value: CrystalCoordinates) -> RigidMapResult:
        """Map data to latent."""
        raise TypeError(f"{type(self).__name__} defines no inverse (data to latent) map")


class RigidChain(RigidBijection):
    """Maps one after the other; the list is in the order latent -> data."""

    def __init__(self, layers: list[RigidBijection]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, value: CrystalCoordinates) -> RigidMapResult:
        log_det = value.displacements.new_zeros(len(value.displacements))
        for layer in self.layers:
            value, change = layer(value)
            log_det = log_det + change
        return RigidMapResult(value, log_det)

    def inverse(self, value: CrystalCoordinates) -> RigidMapResult:
        log_det = value.displacements.new_zeros(len(value.displacements))
        for layer in cast(Iterable[RigidBijection], reversed(self.layers)):
            value, change = layer.inverse(value)
            log_det = log_det + change
        return RigidMapResult(value, log_det)


class Crystal(nn.Module):
    """Sites of M labelled bodies in an orthorhombic periodic box, or of bodies in the open.

    Positions enter relative to that of the first body, so that everything is invariant under translations; the first
    body's own position is no part of any density here.

    Args:
        sites: ``(M, 3)`` nm, a position for each body.
        orientations: ``(M, 4)`` unit quaternions.
        box: ``(3,)`` nm, lengths of the box; None where nothing is periodic.

    Raises:
        ConfigurationError: for shapes that do not fit, or a box that is not three positive lengths.
    """

    origin: Tensor
    sites: Tensor
    orientations: Tensor
    box: Tensor | None

    def __init__(self, sites: Tensor, orientations: Tensor, box: Tensor | None = None) -> None:
        super().__init__()
        places = torch.as_tensor(sites, dtype=torch.float64)
        quaternions = torch.as_tensor(orientations, dtype=torch.float64)
        if places.ndim != 2 or places.shape[1] != 3 or quaternions.shape != (len(places), 4):
            raise ConfigurationError(
                f"sites {tuple(places.shape)} and orientations {tuple(quaternions.shape)} must be (M, 3) and (M, 4)"
            )
        lengths = None if box is None else torch.as_tensor(box, dtype=torch.float64)
        if lengths is not None and (lengths.shape != (3,) or not bool((lengths > 0).all())):
            raise ConfigurationError(
                f"the box must be three positive lengths in nm, got shape {tuple(lengths.shape)}: only orthorhombic boxes have "
                "their flow here"
            )
        # Not in the state: they are facts of the system, which a model file holds in its configuration.
        for name, tensor in (
            ("origin", places[0]), ("sites", places - places[:1]), ("orientations", checked_orientations(quaternions)),
            ("box", lengths),
        ):  # fmt: skip
            self.register_buffer(name, tensor, persistent=False)

    @property
    def count(self) -> int:
        """Number of bodies."""
        return len(self.sites)

    def coordinates(self, configuration: BodyConfiguration) -> CrystalCoordinates:
        """Return coordinates about the sites; positions may be in any periodic image."""
        displacements = configuration.positions - configuration.positions[:, :1] - self.sites
        if self.box is not None:
            displacements = displacements - self.box * (displacements / self.box).round()
        return CrystalCoordinates(displacements, product(conjugate(self.orientations), configuration.orientations))

    def configuration(self, coordinates: CrystalCoordinates, origin: Tensor | None = None) -> BodyConfiguration:
        """Return the configuration whose first body is at ``origin`` (B, 3) nm; on its site where None."""
        first = self.origin if origin is None else origin.unsqueeze(1)
        positions = first + self.sites + coordinates.displacements
        return BodyConfiguration(positions, product(self.orientations, coordinates.orientations))

    def describe(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return {
            "sites": (self.origin + self.sites).tolist(),
            "orientations": self.orientations.tolist(),
            "box": None if self.box is None else self.box.tolist(),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """Rebuild from :meth:`describe`."""
        box = description["box"]
        sites, orientations = (
            torch.tensor(description[name], dtype=torch.float64) for name in ("sites", "orientations")
        )
        return cls(sites, orientations, None if box is None else torch.tensor(box, dtype=torch.float64))


def to_flat(coordinates: CrystalCoordinates) -> Tensor:
    """Return ``(B, 6 M - 3)``: displacements of all bodies but the first, and charts of all orientations."""
    charts = to_chart(coordinates.orientations)
    return torch.cat([coordinates.displacements[:, 1:].flatten(1), charts.flatten(1)], dim=1)


def from_flat(flat: Tensor, count: int) -> CrystalCoordinates:
    """Return what :func:`to_flat` maps to ``flat`` ``(B, 6 M - 3)``; quaternions get a positive scalar part."""
    split = 3 * (count - 1)
    displacements = torch.cat([flat.new_zeros(len(flat), 1, 3), flat[:, :split].unflatten(1, (count - 1, 3))], dim=1)
    return CrystalCoordinates(displacements, from_chart(flat[:, split:].unflatten(1, (count, 3))))


def at_rest(bodies: int, count: int = 1) -> CrystalCoordinates:
    """Return ``count`` times the coordinates of the crystal itself, of so many ``bodies``."""
    orientations = torch.zeros(count, bodies, 4, dtype=torch.float64)
    orientations[..., 0] = 1.0
    return CrystalCoordinates(torch.zeros(count, bodies, 3, dtype=torch.float64), orientations)
