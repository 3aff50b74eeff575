"""Quantum Monte Carlo: many-electron wave functions in real space, their electron densities and properties.

Hartree atomic units throughout; :mod:`flowbridge.calculators.qmc.calculator` converts to ASE's.
"""
