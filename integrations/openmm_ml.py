"""OpenMM-ML: a model file as ``MLPotential("flowbridge", modelPath="alanine.flow")``.

OpenMM-ML imports this module when it is imported itself, through the entry point group ``openmmml.potentials``: nothing heavy
is imported at the top, so that a broken torch breaks no other potential. Nobody else should import it before ``openmmml``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import openmm
from openmm import app, unit

try:
    from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory
except ModuleNotFoundError as error:
    from ..core.errors import MissingDependencyError

    raise MissingDependencyError("flowbridge.integrations.openmm_ml needs openmmml: pip install openmmml") from error

if TYPE_CHECKING:
    from ..core.potential import Particles

_OPTIONS = ("dtype", "device", "compilation")


class FlowbridgePotentialImplFactory(MLPotentialImplFactory):
    """What OpenMM-ML asks for potentials by the name ``flowbridge``."""

    def createImpl(self, name: str, modelPath: str | os.PathLike[str] | None = None, **args: Any) -> MLPotentialImpl:
        """Return the potential of a model file.

        Args:
            name: the name it was asked for by.
            modelPath: path of the model file.
            **args: ``dtype``, ``device`` and ``compilation`` of :func:`flowbridge.integrations.openmm.add_potential`.

        Raises:
            ValueError: without a path, or for another argument.
        """
        if modelPath is None:
            raise ValueError(f'a model file is needed: MLPotential("{name}", modelPath="alanine.flow")')
        _refuse_unknown(args, "MLPotential")
        return FlowbridgePotentialImpl(os.fspath(modelPath), args)


class FlowbridgePotentialImpl(MLPotentialImpl):
    """A model file as an OpenMM-ML potential, for a whole System or for a molecule within one.

    Args:
        model: path of the model file.
        options: ``dtype``, ``device``, ``compilation``.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.options = model, options

    def addForces(
        self,
        topology: app.Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **args: Any,
    ) -> None:
        """Add the model's force, and set the masses of its beads where the topology knows no elements.

        Bonds of force constant 0 along the model's come with it: embedding takes the force field's away, and OpenMM knows by
        them which atoms to keep together in a periodic box.

        Args:
            topology: of the System.
            system: to add to; may be empty, as OpenMM-ML gives it where it interpolates.
            atoms: indices of the model's particles, in its order; all where None.
            forceGroup: 0 to 31.
            **args: ``dtype``, ``device`` and ``compilation``, over those given to ``MLPotential``.

        Raises:
            ValueError: for other arguments.
            MoleculeMismatchError: where number, elements or bonds of the atoms are not the model's.
            ConfigurationError: for a periodic model without a box.
            ModelFileError: when the model file cannot be read.
        """
        _refuse_unknown(args, "createSystem")
        # Here, not above: they need torch.
        from ..core.errors import ConfigurationError
        from ..core.evaluator import EvaluationOptions
        from .openmm.forces.add_potential import python_force
        from .openmm.forces.computation import OpenMMEvaluator
        from .openmm.forces.matching import matching_particles

        evaluator = OpenMMEvaluator.of(self.model, EvaluationOptions(**{**self.options, **args}))
        metadata = evaluator.metadata
        if metadata.periodic and topology.getPeriodicBoxVectors() is None:
            raise ConfigurationError(
                f"{self.model} is periodic but the topology has no box: set it with Topology.setPeriodicBoxVectors"
            )
        chosen = list(range(topology.getNumAtoms())) if atoms is None else [int(index) for index in atoms]
        # A System of its own: constraints within the molecule, which OpenMM-ML removes afterwards, do not concern it.
        own = _particles_only(topology, metadata.particles, chosen)
        matching_particles(own, metadata, topology, None if atoms is None else chosen)
        force = python_force(evaluator, [] if atoms is None else chosen)
        force.setForceGroup(forceGroup)
        system.addForce(_joined(metadata.particles, chosen))
        system.addForce(force)
        for index in chosen if system.getNumParticles() else []:
            if system.getParticleMass(index) == 0 * unit.dalton and not system.isVirtualSite(index):
                system.setParticleMass(index, own.getParticleMass(index))

    def getMLLongRange(self) -> bool:
        """Return False: a model sees no periodic images but the nearest."""
        return False


def _refuse_unknown(args: dict[str, Any], where: str) -> None:
    unknown = sorted(set(args) - set(_OPTIONS))
    if unknown:
        raise ValueError(
            f"{where} got {', '.join(map(repr, unknown))}, which a flowbridge model has no use for; it takes "
            f"{', '.join(_OPTIONS)}"
        )


def _particles_only(topology: app.Topology, molecule: Particles, chosen: list[int]) -> openmm.System:
    """Return a System with the topology's particles; those without an element weigh what the model says."""
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(0.0 if atom.element is None else atom.element.mass)
    for index, mass in zip(chosen, molecule.masses, strict=False):
        if system.getParticleMass(index) == 0 * unit.dalton:
            system.setParticleMass(index, mass)
    return system


def _joined(molecule: Particles, chosen: list[int]) -> openmm.HarmonicBondForce:
    bonds = openmm.HarmonicBondForce()
    bonds.setName("FlowbridgeMolecule")
    for i, j in molecule.bonds:
        if max(i, j) < len(chosen):
            bonds.addBond(chosen[i], chosen[j], 0.0, 0.0)
    return bonds
