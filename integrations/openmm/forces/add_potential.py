"""Learned potentials as forces of an OpenMM System."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import openmm
import torch
from openmm import app, unit

from ....core.errors import ConfigurationError
from ....core.evaluator import EvaluationOptions
from ....core.model_files.files import read_header
from ....core.model_files.kinds import find_kind
from ....core.potential import Particles, Potential
from .computation import UNSAVED, OpenMMEvaluator, PotentialComputation
from .matching import matching_particles
from .torchforce import torch_force

BACKENDS = ("python", "torchforce")


def add_potential(
    system: openmm.System,
    potential: Potential | str | os.PathLike[str],
    *,
    topology: app.Topology | None = None,
    particles: Sequence[int] | None = None,
    replicas: int = 1,
    force_group: int = 0,
    scale_parameter: str | None = None,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    compilation: str = "auto",
    parameter_derivatives: Sequence[str] = (),
) -> openmm.Force:
    """Add a potential to a System as a force, and return that force.

    Nothing already in the System is removed: a force field that acts on the same particles adds to the
    potential. Start from :func:`particle_system` for a molecule that the potential alone describes.

    The force can be serialised with the System (``openmm.XmlSerializer``, ``copy.deepcopy``,
    ``CustomCVForce``) when the potential comes from a model file, or was saved to one and has not changed
    since. What is stored then is the file's absolute path and digest; a System that is read back when the
    file is gone or another gives a warning with the reason and stops with it at the first evaluation. As with
    every ``PythonForce``, reading the XML of a System runs the pickle in it: read only what you trust.

    Args:
        system: the System to add to; all particles must be there already.
        potential: a potential, or the path of a model file. An object is used as it is, not copied:
            training it further changes the force, but not what OpenMM stores of it.
        topology: where elements and bonds are compared with the potential's; without it masses are compared.
        particles: indices the potential acts on, in its own order; all particles where None.
        replicas: how many copies of the molecule the particles hold, one after the other. They are evaluated
            as one batch and their energies added: one Context then runs many replicas, at the speed of
            batches.
        force_group: OpenMM force group, 0 to 31.
        scale_parameter: name of a global parameter, 1 by default, that multiplies energy and forces, say
            ``"flow_scale"``; without it the force has none, which spares reading it at every step. Forces of one System
            that share the name share the parameter.
        backend: ``"python"`` is ``openmm.PythonForce``. ``"torchforce"`` is ``openmmtorch.TorchForce``, TorchScript within
            the System: the XML holds the model itself, no path. ``"auto"`` takes ``"python"``, which works everywhere and
            is the fastest by far with a compiled model, except where ``parameter_derivatives`` ask for ``"torchforce"``.
        dtype: floating type; see :class:`~flowbridge.core.evaluator.EvaluationOptions`, as for the next two.
        device: torch device.
        compilation: whether to compile.
        parameter_derivatives: names of global parameters by which a Context is to give derivatives of the energy;
            ``"torchforce"`` only.

    Raises:
        MissingDependencyError: when the backend needs a package that is not there, or does not load.
        CompilationError: when ``compilation`` is ``"always"`` and the potential cannot be compiled.
        MoleculeMismatchError: when number, elements, bonds or masses of the particles are not the
            potential's.
        ConfigurationError: for constraints or virtual sites among the particles (their absence, where the potential is of rigid
            bodies), contradicting periodic
            boundaries, a name taken twice, a backend that is not there, or another argument that cannot be
            used.
        ModelFileError: when the model file cannot be read.

    Warns:
        UserWarning: when the potential is in no model file, so that OpenMM can run but not serialise the
            force; and of a TorchForce whose XML this OpenMM could write but not read.
    """
    backend = _chosen_backend(backend, parameter_derivatives)
    if not 0 <= force_group <= 31:
        raise ConfigurationError(f"force_group must be between 0 and 31, got {force_group}")
    if backend == "torchforce":
        if device is not None:
            raise ConfigurationError("backend='torchforce' runs on the device of OpenMM's platform: leave device out")
        compilation = "never"  # TorchScript takes the place of the program
    evaluator = OpenMMEvaluator.of(potential, EvaluationOptions(replicas, scale_parameter, dtype, device, compilation))
    chosen = matching_particles(system, evaluator.metadata, topology, particles, replicas)
    if backend == "torchforce":
        force = torch_force(evaluator, chosen, system.getNumParticles(), parameter_derivatives)
    else:
        force = python_force(evaluator, [] if particles is None else chosen)
        if evaluator.source is None:
            warnings.warn(UNSAVED, stacklevel=2)
    force.setForceGroup(force_group)
    system.addForce(force)
    return force


def python_force(evaluator: OpenMMEvaluator, particles: Sequence[int] = ()) -> openmm.PythonForce:
    """Return a PythonForce of a potential, compared with no System and not yet in one.

    Args:
        evaluator: of the potential.
        particles: indices in the System, in the order of the potential; all where there are none, which spares OpenMM a
            gather at every step.
    """
    force = openmm.PythonForce(PotentialComputation(evaluator), evaluator.global_parameters, particles)
    force.setUsesPeriodicBoundaryConditions(evaluator.metadata.periodic)
    force.setName("FlowbridgePotential")
    return force


def particle_system(
    potential: Potential | str | os.PathLike[str], *, replicas: int = 1, hydrogen_mass: float | None = None
) -> openmm.System:
    """Return a System of the potential's particles and no force: where flow-driven dynamics starts.

    Args:
        potential: a potential, or the path of a model file.
        replicas: how many copies of the molecule to put in, one after the other.
        hydrogen_mass: mass in amu given to every hydrogen bonded to a heavier atom, which loses what its
            hydrogens gain, so that longer time steps are stable; None keeps the potential's masses.

    Raises:
        ConfigurationError: when masses are not positive or would not stay so, or there are no bonds to move
            mass along.
        ModelFileError: when the model file cannot be read.
    """
    EvaluationOptions(replicas)
    molecule = _particles_of(potential)
    masses = list(molecule.masses)
    if hydrogen_mass is not None:
        if not molecule.bonds:
            raise ConfigurationError("hydrogen_mass needs bonds to move mass along, and the potential knows none")
        numbers = molecule.atomic_numbers
        for i, j in molecule.bonds:
            heavy, light = (i, j) if numbers[j] == 1 else (j, i)
            if numbers[light] == 1 and numbers[heavy] > 1:
                masses[heavy] -= hydrogen_mass - masses[light]
                masses[light] = hydrogen_mass
    for index, mass in enumerate(masses):
        if not 0 < mass < float("inf"):
            raise ConfigurationError(
                f"{molecule.label(index)} would have a mass of {mass:.3f} amu; masses must be positive"
                + ("" if hydrogen_mass is None else f": hydrogen_mass={hydrogen_mass} takes too much from it")
            )
    system = openmm.System()
    for _ in range(replicas):
        for mass in masses:
            system.addParticle(mass * unit.dalton)
    return system


def _particles_of(potential: Potential | str | os.PathLike[str]) -> Particles:
    if isinstance(potential, str | os.PathLike):
        header = read_header(potential)
        kind = find_kind(header.kind, Path(potential))
        if kind is not None and issubclass(kind, Potential):
            return header.particles  # the model need not be built
    return Potential.of(potential).metadata.particles


def _chosen_backend(backend: str, derivatives: Sequence[str]) -> str:
    """Return the backend that ``auto`` stands for, and any other that exists as it is."""
    if backend not in ("auto", *BACKENDS):
        raise ConfigurationError(
            f"backend {backend!r} is not known: use 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    if backend == "auto":
        return "torchforce" if derivatives else "python"
    if derivatives and backend != "torchforce":
        raise ConfigurationError(
            f"backend {backend!r} gives no derivatives by global parameters: use backend='torchforce'"
        )
    return backend
