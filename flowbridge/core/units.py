"""Units inside flowbridge: nm, kJ/mol, ps, amu, K, elementary charge, radians.

Only the gas constant is needed inside; every conversion to another package's units happens in that
package's adapter, with that package's own constants.
"""

from scipy.constants import gas_constant

GAS_CONSTANT = gas_constant / 1000.0
"""Molar gas constant, kJ/(mol K) (CODATA, by way of scipy)."""


def thermal_energy(temperature: float) -> float:
    """Return kT in kJ/mol for a temperature in K; raises ValueError unless it is positive and finite."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number of kelvin, got {temperature!r}")
    return GAS_CONSTANT * temperature
