"""What ASE finds in the entry point group ``ase.plugins``: the calculator, by the name ``flowbridge``.

ASE's plugins are new and their classes private: nobody but ASE imports this module, it imports nothing heavy, and where ASE has
moved them it registers nothing rather than break ASE's own commands.
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
