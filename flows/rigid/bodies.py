"""Rigid bodies in two descriptions: the positions of all sites, and a position with an orientation for each body."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError, CoordinateError
from .maps.quaternions import checked_orientations, rotation_matrices, superposition

RIGIDITY_TOLERANCE = 1e-3
"""Largest distance in nm of a site from its place in the body: constraints in single precision keep well below it."""


class BodyConfiguration(NamedTuple):
    """Positions ``(B, M, 3)`` in nm and unit quaternions ``(B, M, 4)`` of M bodies."""

    positions: Tensor
    orientations: Tensor


class RigidBodies(nn.Module):
    """M equal rigid bodies of S sites; sites of one body follow each other, and bodies follow each other.

    The Boltzmann distribution of rigid bodies has the density ``exp(-U/kT)`` per volume of position and share of
    orientations (Haar measure), whatever point of the body its position is: the integral over velocities gives a
    constant. Quaternions have this measure as the area of their sphere.

    Args:
        template: ``(S, 3)`` nm, sites in the frame of the body. Its origin is what "position" means.
        count: number of bodies M.

    Raises:
        ConfigurationError: when all sites are on a line through the origin: then they do not show the orientation.
    """

    template: Tensor

    def __init__(self, template: Tensor, count: int) -> None:
        super().__init__()
        sites = torch.as_tensor(template, dtype=torch.float64)
        if sites.ndim != 2 or sites.shape[1] != 3 or not bool(torch.isfinite(sites).all()):
            raise ConfigurationError(f"a template is (sites, 3) finite numbers in nm, got shape {tuple(sites.shape)}")
        if count < 1:
            raise ConfigurationError(f"the number of bodies must be positive, got {count}")
        if len(sites) < 2 or float(torch.linalg.svdvals(sites)[1]) < 10 * RIGIDITY_TOLERANCE:
            raise ConfigurationError(
                "the sites of a body lie on one line through its origin, so that they do not show its orientation"
            )
        self.register_buffer("template", sites)
        self.count = count

    @classmethod
    def centred(cls, sites: Tensor, masses: Tensor, count: int) -> RigidBodies:
        """Return bodies whose positions are their centres of mass; ``sites`` (S, 3) nm, ``masses`` (S,)."""
        weights = torch.as_tensor(masses, dtype=torch.float64)
        places = torch.as_tensor(sites, dtype=torch.float64)
        return cls(places - (weights @ places) / weights.sum(), count)

    @property
    def sites(self) -> int:
        """Number of sites of one body."""
        return len(self.template)

    def places(self, configuration: BodyConfiguration) -> Tensor:
        """Return the positions ``(B, M S, 3)`` of all sites in nm; differentiable.

        Raises CoordinateError for shapes that do not fit, and quaternions that are not of unit length.
        """
        positions, orientations = configuration
        expected = (len(positions), self.count)
        if positions.shape != (*expected, 3) or orientations.shape != (*expected, 4):
            raise CoordinateError(
                f"positions {tuple(positions.shape)} and orientations {tuple(orientations.shape)} do not describe "
                f"{self.count} bodies: expected (B, {self.count}, 3) and (B, {self.count}, 4)"
            )
        matrices = rotation_matrices(checked_orientations(orientations))
        arms = torch.einsum("bmij,sj->bmsi", matrices, self.template.to(matrices))
        return (positions.unsqueeze(2) + arms).flatten(1, 2)

    def configuration(self, places: Tensor, box: Tensor | None = None) -> BodyConfiguration:
        """Return positions and orientations of bodies whose sites are at ``places``; differentiable once.

        Args:
            places: ``(B, M S, 3)`` nm.
            box: ``(3,)`` edges of an orthorhombic box in nm, by which cut bodies are made whole; None where they are.

        Raises:
            CoordinateError: when a body is not the template moved, within :data:`RIGIDITY_TOLERANCE`: it was cut by a
                periodic boundary, has collapsed, or was not held by constraints. The message names it.
        """
        total = self.count * self.sites
        if places.ndim != 3 or places.shape[1:] != (total, 3):
            raise CoordinateError(
                f"positions have shape {tuple(places.shape)}, expected (B, {total}, 3) for {self.count} bodies of {self.sites} "
                "sites"
            )
        bodies = places.double().unflatten(1, (self.count, self.sites))
        if box is not None:
            bodies = bodies - box * ((bodies - bodies[:, :, :1]) / box).detach().round()
        middle = self.template.mean(0)
        centres = bodies.mean(2, keepdim=True)
        orientations = superposition(bodies - centres, self.template - middle)
        positions = centres.squeeze(2) - torch.einsum("bmij,j->bmi", rotation_matrices(orientations), middle)
        result = BodyConfiguration(positions, orientations)
        with torch.no_grad():
            deviations = (self.places(result) - bodies.flatten(1, 2)).norm(dim=-1)
            deviations = deviations.unflatten(1, (self.count, self.sites)).amax(2)
        broken = ~(deviations <= RIGIDITY_TOLERANCE)
        if bool(broken.any()):
            frame, body = (int(index) for index in broken.nonzero()[0])
            raise CoordinateError(
                f"body {body} of configuration {frame} is not rigid: a site is {float(deviations[frame, body]):.3g} nm from "
                f"its place (allowed: {RIGIDITY_TOLERANCE} nm; {int(broken.sum())} such bodies). Make molecules whole, keep "
                "them rigid by constraints, and pass the sites in the order of the template"
            )
        return result
