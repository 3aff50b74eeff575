"""Run in a clean environment that has the wheel and its dependencies only, from an empty folder."""

import pkgutil
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import flowbridge.core.errors

home = Path(flowbridge.__file__).parent
if not home.is_relative_to(sys.prefix):
    sys.exit(f"flowbridge comes from {home}, not from the environment {sys.prefix}")
if "torch" in sys.modules or "openmm" in sys.modules or "ase" in sys.modules:
    sys.exit("importing flowbridge alone loads torch or an engine")
if not (home / "py.typed").is_file():
    sys.exit("the wheel holds no py.typed")
for name in flowbridge.__all__:
    getattr(flowbridge, name)
modules = [module.name for module in pkgutil.walk_packages(flowbridge.__path__, "flowbridge.")]
for name in modules:
    try:
        import_module(name)
    except flowbridge.core.errors.MissingDependencyError as error:
        print(f"{name}: {error}")  # an adapter of an engine that is not installed has to say so
groups = ("flowbridge.model_kinds", "flowbridge.energy_sources")
entries = [entry for group in groups for entry in entry_points(group=group)]
for entry in entries:
    entry.load()
print(f"flowbridge {flowbridge.__version__}: {len(modules)} modules and {len(entries)} entry points load")
