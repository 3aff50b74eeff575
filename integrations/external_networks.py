"""Energy networks of other libraries as potentials: TorchMD-Net, SchNetPack, MACE, and others through a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from ase import units
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.potential import Particles, Potential, PotentialMetadata
from ..core.units import thermal_energy

LengthUnit = Literal["angstrom", "nm", "bohr"]
EnergyUnit = Literal["eV", "kJ/mol", "kcal/mol", "hartree", "kT"]

_PER_NM = {"angstrom": units.nm / units.Angstrom, "nm": 1.0, "bohr": units.nm / units.Bohr}
_IN_EV = {"eV": 1.0, "kJ/mol": units.kJ / units.mol, "kcal/mol": units.kcal / units.mol, "hartree": units.Hartree}


class Structures(NamedTuple):
    """Copies of a molecule in one list of atoms.

    Attributes:
        types: atomic numbers or bead types ``(B N,)``.
        positions: positions ``(B N, 3)`` in the network's unit of length and dtype.
        molecule: index ``(B N,)`` of each atom's copy.
        copies: number of copies B.
    """

    types: Tensor
    positions: Tensor
    molecule: Tensor
    copies: int

    def pairs(self, cutoff: float) -> Tensor:
        """Return indices ``(2, E)`` of all ordered pairs within a copy that are closer than ``cutoff``."""
        each = self.positions.detach().reshape(self.copies, -1, 3)
        near = torch.cdist(each, each) < cutoff
        near.diagonal(dim1=1, dim2=2).fill_(False)
        copy, first, second = near.nonzero(as_tuple=True)
        return torch.stack((first, second)) + copy * each.shape[1]


Evaluate = Callable[[Any, Structures], Tensor]
"""Function of a network and structures that returns energies ``(B,)`` or ``(B, 1)`` in the network's unit."""


class ExternalNetwork(nn.Module):
    """A network of another library as a module from positions ``(B, N, 3)`` nm to energies ``(B,)`` in the network's own unit.

    It can be trained: :func:`~flowbridge.forcefields.training.fitting.train_force_field` takes one with energies in kT in place
        of
    a network's configuration.

    Args:
        network: network of TorchMD-Net (``torchmdnet.models.model.TorchMD_Net``), SchNetPack
            (``schnetpack.model.NeuralNetworkPotential``) or MACE (``mace.modules.MACE`` and its subclasses); any other with
            ``evaluate``. Its parameters are shared, not copied.
        particles: the N particles.
        types: the network's types of the particles; atomic numbers where None.
        length: unit of the network's positions.
        evaluate: function that calls a network of another library.
        head: head of a MACE network with several.

    Raises:
        ConfigurationError: for a network of an unknown library, particles unknown to it, or an energy that cannot be
            differentiated.
    """

    types: Tensor

    def __init__(
        self,
        network: nn.Module,
        particles: Particles,
        types: Sequence[int] | None = None,
        length: LengthUnit = "angstrom",
        evaluate: Evaluate | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        if length not in _PER_NM:
            raise ConfigurationError(f"length must be one of {', '.join(_PER_NM)}, got {length!r}")
        if types is None and 0 in particles.atomic_numbers:
            bead = particles.label(particles.atomic_numbers.index(0))
            raise ConfigurationError(f"{bead} is no chemical element: give types=, one number a particle")
        chosen = tuple(particles.atomic_numbers if types is None else types)
        if len(chosen) != len(particles):
            raise ConfigurationError(f"types has {len(chosen)} numbers for {len(particles)} particles")
        self.particles, self.per_nm = particles, _PER_NM[length]
        self.network = network
        self.register_buffer("types", torch.tensor(chosen), persistent=False)
        self._evaluate = evaluate or _evaluation(network, chosen, head)
        self._check()

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies ``(B,)`` in the network's unit and dtype, of positions ``(B, N, 3)`` in nm."""
        count, size = positions.shape[:2]
        scaled = (self.per_nm * positions).reshape(-1, 3).to(self._dtype(positions))
        molecule = torch.arange(count, device=positions.device).repeat_interleave(size)
        result = self._evaluate(self.network, Structures(self.types.repeat(count), scaled, molecule, count))
        if result.shape not in ((count,), (count, 1)):
            raise ConfigurationError(
                f"the network gives a tensor of shape {tuple(result.shape)} for {count} molecules: one energy per molecule is "
                "needed"
            )
        return result.reshape(count)

    def _check(self) -> None:
        """Evaluate once, with gradient; raise ConfigurationError with the library's reason where that fails."""
        size = len(self.particles)
        name = type(self.network).__name__
        cloud = torch.randn(2, size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        leaf = (0.1 * size ** (1 / 3) * cloud).to(self.types.device).requires_grad_(True)
        try:
            energies = self(leaf)
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"this {name} cannot be evaluated for {size} particles of types {sorted(set(self.types.tolist()))}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not energies.requires_grad:
            raise ConfigurationError(
                f"the energy of this {name} does not depend on positions through torch: it has no forces"
            )

    def _dtype(self, positions: Tensor) -> torch.dtype:
        tensors = (*self.network.parameters(), *self.network.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), positions.dtype)


class NetworkPotential(Potential):
    """A network of another library as a potential of an isolated molecule, for OpenMM, ASE and all other engines.

    No model file can hold it, since a file contains no code of other libraries: OpenMM runs it, but cannot serialise the
        System.
    It is not compiled.

    Args:
        network: see :class:`ExternalNetwork`.
        particles: the N particles.
        energy: unit of the network's energies; ``kT`` needs a temperature.
        length: unit of the network's positions.
        types: the network's types of the particles; atomic numbers where None.
        prior: energy of the same particles to add, as coarse-grained networks need it.
        temperature: temperature of a potential of mean force, K; that of the prior where None.
        evaluate: see :class:`ExternalNetwork`.
        head: see :class:`ExternalNetwork`.

    Raises:
        ConfigurationError: see :class:`ExternalNetwork`; for a prior of other particles, and kT without a temperature.
    """

    description = "a network of an isolated molecule"
    one_program = False

    def __init__(
        self,
        network: nn.Module,
        particles: Particles,
        *,
        energy: EnergyUnit = "eV",
        length: LengthUnit = "angstrom",
        types: Sequence[int] | None = None,
        prior: Potential | None = None,
        temperature: float | None = None,
        evaluate: Evaluate | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        adapted = ExternalNetwork(network, particles, types, length, evaluate, head)
        if prior is not None and prior.metadata.particles.names != particles.names:
            first, second = (
                f"{len(names)} particles ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                for names in (prior.metadata.particles.names, particles.names)
            )
            raise ConfigurationError(
                f"the prior is of {first}, the network of {second}: give one of the same particles"
            )
        if temperature is None and prior is not None:
            temperature = prior.metadata.temperature
        self.metadata = PotentialMetadata(particles, temperature=temperature)
        self.network, self.prior = adapted, prior
        self.scale = _in_kilojoules(energy, temperature)

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol; see :meth:`Potential.forward`.

        Raises ConfigurationError when a cell or a global parameter is given: molecules are isolated.
        """
        self.check_arguments(cell, global_parameters)
        energy: Tensor = self.scale * self.network(positions).double()
        return energy if self.prior is None else energy + self.prior(positions)


def _in_kilojoules(energy: str, temperature: float | None) -> float:
    if energy == "kT":
        if temperature is None:
            raise ConfigurationError("energies in kT need a temperature")
        return thermal_energy(temperature)
    if energy not in _IN_EV:
        raise ConfigurationError(f"energy must be one of {', '.join((*_IN_EV, 'kT'))}, got {energy!r}")
    return _IN_EV[energy] / _IN_EV["kJ/mol"]


def _evaluation(network: nn.Module, types: tuple[int, ...], head: str | None) -> Evaluate:
    """Return the function that calls a network, chosen by the library of one of its classes."""
    libraries = [kind.__module__.partition(".")[0] for kind in type(network).__mro__]
    if "torchmdnet" in libraries:
        return _torchmdnet_energies
    if "schnetpack" in libraries:
        return _schnetpack_energies
    if "mace" in libraries:
        return _MaceEnergies(network, types, head)
    raise ConfigurationError(
        f"a {type(network).__name__} of {type(network).__module__} is no network of TorchMD-Net, SchNetPack or MACE: give "
        "evaluate=, a function of the network and Structures"
    )


def _torchmdnet_energies(network: Any, structures: Structures) -> Tensor:
    """Call TorchMD-Net, which finds neighbours itself, with its own differentiation switched off."""
    differentiates = network.derivative
    network.derivative = False
    try:
        energies, _ = network(structures.types, structures.positions, batch=structures.molecule)
    finally:
        network.derivative = differentiates
    result: Tensor = energies
    return result


def _schnetpack_energies(network: Any, structures: Structures) -> Tensor:
    """Call the modules of a SchNetPack model, without those that differentiate the energy."""
    first, second = structures.pairs(float(network.representation.cutoff))
    positions = structures.positions
    size = len(positions) // structures.copies
    inputs = {
        "_positions": positions,
        "_atomic_numbers": structures.types,
        "_idx_m": structures.molecule,
        "_idx_i": first,
        "_idx_j": second,
        "_offsets": positions.new_zeros(len(first), 3),
        "_n_atoms": structures.types.new_full((structures.copies,), size),
        "_cell": positions.new_zeros(structures.copies, 3, 3),
        "_pbc": torch.zeros(3 * structures.copies, dtype=torch.bool, device=positions.device),
    }
    responses = [module for module in network.output_modules if getattr(module, "required_derivatives", None)]
    for module in (*network.input_modules, network.representation, *network.output_modules):
        if module not in responses:
            inputs = module(inputs)
    outputs = network.postprocess(inputs)
    if "energy" not in outputs:
        raise ConfigurationError(
            "the SchNetPack model has no output 'energy': give the Atomwise module output_key='energy'"
        )
    energies: Tensor = outputs["energy"]
    return energies


class _MaceEnergies:
    """Call MACE, with atoms as indices of the network's list of elements."""

    def __init__(self, network: Any, types: tuple[int, ...], head: str | None) -> None:
        known = [int(number) for number in network.atomic_numbers]
        unknown = sorted(set(types) - set(known))
        if unknown:
            raise ConfigurationError(f"the network knows elements {known}, not {unknown}: train one that does")
        heads = list(getattr(network, "heads", None) or ["Default"])
        if head is None and len(heads) > 1:
            raise ConfigurationError(f"the network has heads {', '.join(heads)}: name one with head=")
        if head is not None and head not in heads:
            raise ConfigurationError(f"the network has no head {head!r}, only {', '.join(heads)}")
        self.head = 0 if head is None else heads.index(head)
        self.elements = torch.tensor([known.index(number) for number in types])
        self.known = len(known)

    def __call__(self, network: Any, structures: Structures) -> Tensor:
        positions, count = structures.positions, structures.copies
        size = len(positions) // count
        edges = structures.pairs(float(network.r_max))
        elements = self.elements.to(positions.device).repeat(count)
        zeros = positions.new_zeros(edges.shape[1], 3)
        data = {
            "positions": positions,
            "node_attrs": nn.functional.one_hot(elements, self.known).to(positions.dtype),
            "edge_index": edges,
            "shifts": zeros,
            "unit_shifts": zeros,
            "cell": positions.new_zeros(3 * count, 3),
            "batch": structures.molecule,
            "ptr": torch.arange(count + 1, device=positions.device) * size,
            "head": torch.full((count,), self.head, device=positions.device),
        }
        energies: Tensor = network(data, training=network.training, compute_force=False)["energy"]
        return energies
