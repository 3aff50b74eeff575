"""Conformance tests that anyone can run on a Potential of their own.

In a test of yours::

    from flowbridge.testing import check_potential


    def test_my_potential():
        print(check_potential(MyPotential()))

:func:`check_potential` raises an error that lists everything that is wrong; :func:`examine_potential` returns the same report
and raises nothing.
"""

from .conformance import check_potential, examine_potential
from .report import Check, ConformanceError, ConformanceReport

__all__ = ["Check", "ConformanceError", "ConformanceReport", "check_potential", "examine_potential"]
