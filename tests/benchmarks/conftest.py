"""The project's ``benchmarks``, which are no installed package; opacus installs another one of that name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
    del sys.modules[name]
