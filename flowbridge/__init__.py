"""Learned potentials where molecules are simulated: OpenMM forces, ASE calculators, Boltzmann samplers.

Names are loaded on first use: ``import flowbridge`` itself imports neither torch nor any simulation engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.generator import Generator
    from .core.model import Model
    from .core.model_files.files import load, save
    from .core.potential import Potential
    from .core.samples import WeightedSamples
    from .flows.boltzmann.generator import BoltzmannGenerator

    __version__: str

__all__ = ["BoltzmannGenerator", "Generator", "Model", "Potential", "WeightedSamples", "__version__", "load", "save"]

_HOMES = {
    "BoltzmannGenerator": ".flows.boltzmann.generator",
    "Generator": ".core.generator",
    "Model": ".core.model",
    "Potential": ".core.potential",
    "WeightedSamples": ".core.samples",
    "load": ".core.model_files",
    "save": ".core.model_files",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer than all the rest here

        value: Any = version("flowbridge")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
