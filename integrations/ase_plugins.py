"""Plugin of ASE, in the entry point group ``ase.plugins``: the calculator under the name ``flowbridge``.

ASE's plugins are new and their classes private. Only ASE imports this module, which imports nothing heavy; where an ASE has
moved its plugins, it registers nothing, so that ASE's own commands still work.
"""

from __future__ import annotations

from typing import Any

__ase_plugins__: set[Any] = set()

try:
    from ase._4.plugins.plugin import CalculatorPlugin
except ImportError:
    pass
else:
    __ase_plugins__.add(
        CalculatorPlugin("flowbridge", implementation="flowbridge.calculators.potential_calculator.PotentialCalculator")
    )
