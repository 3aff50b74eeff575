"""Learned potentials as ``openmmtorch.TorchForce``: TorchScript within the System, for users whose pipelines expect it.

The joint graph of energy and forces is recorded as plain tensor operations, as for the compiler, and traced to TorchScript: no
Python runs at a step, and TorchForce differentiates nothing. Where derivatives by global parameters are asked for, the energy
alone is recorded, and TorchForce differentiates it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openmm
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ....core.errors import ConfigurationError, MissingDependencyError
from ....core.evaluator import Evaluator

_INSTALL = (
    "pip install torch==2.9.1 openmmtorch==1.5, in an environment of their own (it needs the torch it was built for)"
)

_LOADED_LATER: set[str] = set()
# Its library was built against the serialisation of OpenMM 8.5, which 8.6 changed.
_UNREADABLE = (
    "openmmtorch 1.5 crashes where OpenMM 8.6 reads XML with a TorchForce in it: read such XML with OpenMM 8.5, "
    "or use backend='python'"
)


def torch_force(
    evaluator: Evaluator, particles: Sequence[int], total: int, derivatives: Sequence[str] = ()
) -> openmm.Force:
    """Return a TorchForce of a potential, not yet in a System.

    Args:
        evaluator: of the potential, not compiled; its present parameters become constants.
        particles: indices in the System, in the order of the potential; of all replicas.
        total: number of particles of the System.
        derivatives: names of global parameters by which the energy is to be differentiated.

    Raises:
        MissingDependencyError: where openmmtorch is not installed, or does not load with this torch.
        ConfigurationError: for a potential that cannot be recorded, or a derivative by something else.
    """
    package = _openmmtorch()
    parameters = evaluator.global_parameters
    unknown = sorted(set(derivatives) - set(parameters))
    if unknown:
        raise ConfigurationError(
            f"there is no global parameter {unknown[0]!r} to differentiate by; there are: {', '.join(parameters) or 'none'}"
        )
    module = _Evaluation(evaluator, particles, total, energy_only=bool(derivatives))
    if Version(openmm.__version__) >= Version("8.6") and Version(version("openmmtorch")) <= Version("1.5"):
        warnings.warn(_UNREADABLE, stacklevel=3)
    force = package.TorchForce(traced(module))
    force.setName("FlowbridgePotential")
    force.setOutputsForces(not derivatives)
    force.setUsesPeriodicBoundaryConditions(evaluator.metadata.periodic)
    for name, value in parameters.items():
        force.addGlobalParameter(name, value)
    for name in derivatives:
        force.addEnergyParameterDerivative(name)
    return force


def traced(module: _Evaluation) -> torch.jit.ScriptModule:
    """Return TorchScript of ``(positions[, box], *parameters) -> energy`` or ``(energy, forces)``, forces of all particles.

    Raises ConfigurationError, with the reason, for a potential whose evaluation depends on data in ways no graph can hold.
    """
    inputs = module.example()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own internals
            # First plain operations, so that derivatives in closed form and custom functions are in the graph themselves.
            graph = make_fx(module.evaluate, tracing_mode="real")(*inputs)
            _spell_out_shapes(graph)
            script: torch.jit.ScriptModule = torch.jit.trace(graph, tuple(inputs), check_trace=False)
            # As TorchForce evaluates it: frozen.
            _agree(torch.jit.freeze(script.eval(), optimize_numerics=False), module, inputs)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"a {type(module.potential).__name__} cannot be traced to TorchScript ({type(error).__name__}: {error}); "
            "backend='python' evaluates any potential"
        ) from error
    return script


class _Evaluation:
    """What TorchForce is to compute, as a function of its inputs."""

    def __init__(self, evaluator: Evaluator, particles: Sequence[int], total: int, *, energy_only: bool) -> None:
        self.potential, self.options, self.energy_only = evaluator.potential, evaluator.options, energy_only
        self.parameters = evaluator.global_parameters
        self.particles, self.total = torch.tensor(list(particles), dtype=torch.long), total
        self.periodic = evaluator.metadata.periodic

    def example(self) -> list[Tensor]:
        """Return inputs to record with."""
        generator = torch.Generator().manual_seed(20_260)
        drawn = self.potential.example_positions(self.options.replicas, generator).double().reshape(-1, 3)
        positions = torch.zeros(self.total, 3, dtype=torch.float64)
        positions[self.particles] = drawn
        edge = 2.0 * float(drawn.max() - drawn.min())
        box = [edge * torch.eye(3, dtype=torch.float64)] if self.periodic else []
        return [positions, *box, *(torch.tensor(value, dtype=torch.float64) for value in self.parameters.values())]

    def evaluate(self, positions: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the energy (kJ/mol) of all replicas, and the forces on every particle of the System."""
        replicas, dtype = self.options.replicas, self.options.positions_dtype
        batch = positions.index_select(0, self.particles).reshape(replicas, -1, 3).to(dtype)
        cell = rest[0].to(dtype).expand(replicas, 3, 3) if self.periodic else None
        values: dict[str, Any] = dict(zip(self.parameters, rest[1:] if self.periodic else rest, strict=True))
        scale = values.pop(self.options.scale_parameter, 1.0) if self.options.scale_parameter else 1.0
        if self.energy_only:
            return scale * self.potential(batch, cell, **values).double().sum()
        energy, forces = self.potential.energy_and_forces(batch, cell, **values)
        own = forces.double().reshape(-1, 3)
        every = torch.zeros_like(positions, dtype=torch.float64).index_copy(0, self.particles, own)
        return scale * energy.double().sum(), scale * every


def _spell_out_shapes(graph: GraphModule) -> None:
    """Write sizes of views as numbers: TorchScript, once frozen, takes a -1 in one of them for that of another."""
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.args = (node.args[0], list(node.meta["tensor_meta"].shape))
    graph.recompile()


def _agree(script: nn.Module, module: _Evaluation, inputs: list[Tensor]) -> None:
    """Refuse a trace that gives other numbers elsewhere than where it was recorded."""
    moved = [
        inputs[0] + 1e-3 * torch.sin(torch.arange(inputs[0].numel(), dtype=torch.float64)).reshape(-1, 3),
        *inputs[1:],
    ]
    found, expected = script(*moved), module.evaluate(*moved)
    pairs = [(found, expected)] if isinstance(expected, Tensor) else list(zip(found, expected, strict=True))
    for a, b in pairs:
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())):
            raise ConfigurationError(
                f"the trace of a {type(module.potential).__name__} gives other numbers than the potential: its evaluation "
                "depends on data; backend='python' evaluates any potential"
            )


def _openmmtorch() -> Any:
    try:
        import openmmtorch
    except Exception as error:
        raise MissingDependencyError(
            f"backend='torchforce' needs openmmtorch, which does not load here ({type(error).__name__}: {error}): {_INSTALL}"
        ) from error
    _load_plugins_left_out()
    return openmmtorch


def _load_plugins_left_out() -> None:
    """Load TorchForce's kernels where openmm was imported before torch, whose libraries they need: OpenMM left them out."""
    loaded = {Path(name).name for name in openmm.pluginLoadedLibNames} | _LOADED_LATER
    folder = Path(openmm.version.openmm_library_path) / "plugins"
    platforms = {openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())}
    for plugin in sorted(folder.glob("*OpenMMTorch*")):
        of = plugin.stem.partition("OpenMMTorch")[2]
        if plugin.name not in loaded and of in platforms:
            openmm.Platform.loadPluginLibrary(str(plugin))
            _LOADED_LATER.add(plugin.name)
