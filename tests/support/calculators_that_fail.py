"""ASE calculators that go wrong, in a module that other processes can import."""

import time

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones


def lennard_jones():
    return LennardJones(sigma=1.0, epsilon=0.5, rc=20.0)


class _Wrong(Calculator):
    implemented_properties = ["energy", "forces"]

    def __init__(self, energy=np.nan, seconds=0.0, message=None):
        super().__init__()
        self.value, self.seconds, self.message = energy, seconds, message

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.message is not None:
            raise RuntimeError(self.message)
        time.sleep(self.seconds)
        self.results = {"energy": self.value, "forces": np.full((len(atoms), 3), self.value)}


def not_a_number():
    return _Wrong()


def raising():
    return _Wrong(message="no self-consistency")


def slow():
    return _Wrong(energy=1.0, seconds=5.0)
