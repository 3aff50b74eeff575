"""Conformance tests that anyone can run on a potential, a generator, or a transform of a flow, of their own.

In a test of yours::

    from flowbridge.testing import check_potential


    def test_my_potential():
        print(check_potential(MyPotential()))

:func:`check_potential` raises an error that lists everything that is wrong; :func:`examine_potential` returns the same report
and raises nothing. :func:`check_generator` and :func:`examine_generator` do the same for a density that can be drawn from.
:func:`check_adapter` compares an engine with a potential, :func:`check_transform` checks an elementwise transform of a flow.
"""

from .adapters import check_adapter
from .conformance import check_potential, examine_potential
from .generators import check_generator, examine_generator
from .report import Check, ConformanceError, ConformanceReport
from .transforms import check_transform

__all__ = [
    "Check",
    "ConformanceError",
    "ConformanceReport",
    "check_adapter",
    "check_generator",
    "check_potential",
    "check_transform",
    "examine_generator",
    "examine_potential",
]
