"""Small things tried for real, in a process of their own: what ``flowbridge doctor`` reports.

``python -m flowbridge.workflows.diagnostics.probes SECONDS '["NAME", "ARGUMENT"]' ...`` runs probes one after the other,
and prints one JSON object a line for each. A probe that crashes its process (an extension built for another torch, a
broken driver) takes no caller with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


class ProbeError(Exception):
    """What was tried gave a wrong result."""


def import_package(distribution: str) -> None:
    """Import the package of a distribution."""
    import_module(distribution.replace("-", "_"))


def list_platforms() -> dict[str, Any]:
    """Return the platforms that OpenMM registered and why plugins did not load."""
    import openmm

    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    return {"platforms": names, "failures": list(openmm.Platform.getPluginLoadFailures())}


def python_force(platform: str) -> dict[str, Any]:
    """Run a harmonic PythonForce on a platform and compare energy and forces with the formula."""
    import numpy as np
    import openmm
    from openmm import unit

    stiffness = 10.0

    def springs(state: openmm.State) -> tuple[float, Any]:
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        return 0.5 * stiffness * float((positions**2).sum()), -stiffness * positions

    return _measure(openmm.PythonForce(springs), platform, stiffness, np)


def torch_force() -> dict[str, Any]:
    """Run a scripted torch module through openmmtorch's TorchForce."""
    import numpy as np

    openmmtorch = import_module("openmmtorch")
    import torch

    class Springs(torch.nn.Module):
        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            return 5.0 * positions.square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripting, which TorchForce cannot do without
        module = torch.jit.script(Springs())
    return _measure(openmmtorch.TorchForce(module), "Reference", 10.0, np)


def python_torch_force() -> dict[str, Any]:
    """Run a torch function through openmmtorch's PythonTorchForce."""
    import numpy as np

    openmmtorch = import_module("openmmtorch")
    if not hasattr(openmmtorch, "PythonTorchForce"):
        raise ProbeError("this openmmtorch has no PythonTorchForce")

    def springs(state: Any, positions: Any) -> tuple[Any, Any]:
        return 5.0 * positions.square().sum(), -10.0 * positions

    return _measure(openmmtorch.PythonTorchForce(springs), "Reference", 10.0, np)


def compile_cpp() -> dict[str, Any]:
    """Compile one line of C++ with OpenMP, load it and call it."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "one.cpp"), Path(folder, "one.so")
        source.write_text('#include <omp.h>\nextern "C" int twice(int x) { return 2 * x; }\n')
        command = [*compiler.split(), "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeError(f"{compiler} failed: {done.stderr.strip() or done.returncode}")
        if ctypes.CDLL(str(library)).twice(21) != 42:
            raise ProbeError(f"code compiled by {compiler} gives wrong results")
    banner = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False)
    return {"detail": banner.stdout.partition("\n")[0]}


def compile_torch() -> dict[str, Any]:
    """Compile energy and gradient of a small function with torch inductor and compare with eager."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # an old cache would hide a missing compiler
        import torch

        def energy(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x).square().sum()

        x = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64, requires_grad=True)
        begin = time.perf_counter()
        compiled = torch.compile(energy, fullgraph=True)(x)
        (gradient,) = torch.autograd.grad(compiled, x)
        seconds = time.perf_counter() - begin
        eager = energy(x)
        (expected,) = torch.autograd.grad(eager, x)
        if not (torch.allclose(compiled, eager) and torch.allclose(gradient, expected)):
            raise ProbeError("compiled code and eager code disagree")
    return {"detail": f"a small function compiled in {seconds:.0f} s"}


def cuda_device() -> dict[str, Any]:
    """Multiply on the GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        raise ProbeError(
            f"torch {torch.__version__} sees no CUDA device" + ("" if torch.version.cuda else " (it is a CPU build)")
        )
    ones = torch.ones(64, 64, device="cuda")
    if float((ones @ ones).sum()) != 64.0**3:
        raise ProbeError("a matrix product on the GPU is wrong")
    return {"detail": torch.cuda.get_device_name()}


def learned_potential() -> dict[str, Any]:
    """Save a potential, load it, and compare its energy in torch, OpenMM and ASE."""
    os.environ["FLOWBRIDGE_COMPILE"] = "never"  # what compilers do is tried apart
    import ase.units
    import numpy as np
    import openmm
    import torch
    from ase import Atoms

    from ...calculators import PotentialCalculator
    from ...core.model_files.files import load, register_kind, save
    from ...core.potential import Particles, Potential, PotentialMetadata
    from ...integrations.openmm import add_potential, particle_system

    class ProbeSpring(Potential):
        kind = "flowbridge_probe"

        def __init__(self) -> None:
            super().__init__()
            self.metadata = PotentialMetadata(Particles(("O", "H"), (8, 1), (15.999, 1.008), ((0, 1),)))
            self.length = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def forward(
            self, positions: torch.Tensor, cell: torch.Tensor | None = None, **global_parameters: float
        ) -> torch.Tensor:
            distance = (positions[:, 0] - positions[:, 1]).double().norm(dim=-1)
            return 500.0 * (distance - self.length).square()

        def configuration(self) -> dict[str, Any]:
            return {}

        @classmethod
        def from_configuration(cls, configuration: dict[str, Any]) -> ProbeSpring:
            return cls()

    register_kind(ProbeSpring)
    positions = np.array([[0.0, 0.0, 0.0], [0.07, 0.03, -0.11]])
    expected = 500.0 * (math.sqrt(float((positions[1] ** 2).sum())) - 0.1) ** 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.flow")
        save(ProbeSpring(), path)
        in_torch = float(load(path)(torch.as_tensor(positions[None])).detach())
        system = particle_system(path)
        add_potential(system, path)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(positions)
        in_openmm = context.getState(getEnergy=True).getPotentialEnergy()._value
        atoms = Atoms("OH", positions * (ase.units.nm / ase.units.Angstrom))
        atoms.calc = PotentialCalculator(path)
        in_ase = atoms.get_potential_energy() / (ase.units.kJ / ase.units.mol)
    for where, energy in (("torch", in_torch), ("OpenMM", in_openmm), ("ASE", in_ase)):
        if not math.isclose(energy, expected, rel_tol=1e-8):
            raise ProbeError(f"the energy in {where} is {energy} kJ/mol, expected {expected}")
    return {"detail": "one model file, the same energy in torch, OpenMM and ASE"}


def _measure(force: Any, platform: str, stiffness: float, np: Any) -> dict[str, Any]:
    """Compare the energy and forces of springs to the origin with the formula; return the milliseconds."""
    import openmm
    from openmm import unit

    positions = np.array([[0.1, 0.2, -0.3], [0.0, -0.5, 0.25], [0.7, 0.0, 0.05]])
    system = openmm.System()
    for _ in positions:
        system.addParticle(1.0)
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    context.getState(getEnergy=True)  # the first evaluation sets things up
    begin = time.perf_counter()
    state = context.getState(getEnergy=True, getForces=True)
    milliseconds = 1000.0 * (time.perf_counter() - begin)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    expected = 0.5 * stiffness * float((positions**2).sum())
    if not (math.isclose(energy, expected, rel_tol=1e-4) and np.allclose(forces, -stiffness * positions, 1e-3)):
        raise ProbeError(f"wrong result: energy {energy} kJ/mol, expected {expected}")
    return {"detail": f"energy and forces right, {milliseconds:.2f} ms a call"}


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, ProbeError) else str(error)


PROBES: dict[str, Callable[..., dict[str, Any] | None]] = {
    probe.__name__: probe
    for probe in (
        import_package,
        list_platforms,
        python_force,
        torch_force,
        python_torch_force,
        compile_cpp,
        compile_torch,
        cuda_device,
        learned_potential,
    )
}


def main(seconds: str, *calls: str) -> None:
    """Run probes, each ``[name, *arguments]`` in JSON, and print their results, or reasons for failing under ``error``.

    A probe that takes longer than ``seconds`` ends the process.
    """
    for call in calls:
        name, *arguments = json.loads(call)
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        try:
            found = {"error": None, **(PROBES[name](*arguments) or {})}
        except Exception as error:
            found = {"error": _describe(error)}
        print(json.dumps(found), flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
