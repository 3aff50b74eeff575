"""Charges from a density, and the force field that OpenMM makes of them."""

import numpy as np
import openmm
import pytest
from openmm import app, unit

from flowbridge.calculators.qmc.density.densities import GaussianDensity
from flowbridge.calculators.qmc.electronic_structure import becke_quadrature, reference_density
from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.properties.potential_charges import potential_charges, shell_points
from flowbridge.calculators.qmc.properties.properties import DensityProperties
from flowbridge.core.errors import ConfigurationError
from flowbridge.integrations.openmm.systems.potential_charges import write_force_field
from flowbridge.integrations.openmm.systems.topologies import molecule_topology


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    pyscf = pytest.importorskip("pyscf")
    before = pyscf.lib.num_threads()
    pyscf.lib.num_threads(1)  # its threads wait for each other on a busy machine
    yield
    pyscf.lib.num_threads(before)


@pytest.fixture(scope="module")
def water():
    molecule = Molecule.build([8, 1, 1], [[0, 0, 0.2217], [0, 1.4309, -0.8867], [0, -1.4309, -0.8867]])
    density = GaussianDensity.from_reference(molecule, reference_density(molecule, "hf", "cc-pvdz"))
    return DensityProperties(density, becke_quadrature(molecule, 3))


def test_charges_of_water_reproduce_potential_and_dipole(water):
    found = potential_charges(water, equivalent=[(1, 2)])
    charges = found.charges.value
    assert charges.sum() == pytest.approx(0.0, abs=1e-9)
    assert charges[1] == charges[2]
    assert -1.0 < charges[0] < -0.6  # restrained fits give water -0.7 to -0.85 in Hartree-Fock
    assert found.relative_error < 0.2
    np.testing.assert_allclose(found.dipole, water.dipole().value, atol=0.06)
    free = potential_charges(water, restraint=0.0)
    assert free.charges.value[1] == pytest.approx(free.charges.value[2], abs=0.01)
    assert abs(free.charges.value[0]) >= abs(charges[0]) - 1e-3
    points = shell_points(water.molecule)
    nearest = np.linalg.norm(points[:, None] - water.molecule.centers.numpy(), axis=2).min(1)
    assert nearest.min() > 1.4 * 1.2 / 0.529178 - 1e-6
    for groups in ([(0, 5)], [(0, 1), (1, 2)], [()]):
        with pytest.raises(ConfigurationError, match="separate groups"):
            potential_charges(water, equivalent=groups)


def test_openmm_reads_the_force_field_and_has_the_dipole(water, tmp_path):
    charges = potential_charges(water, equivalent=[(1, 2)]).charges.value
    topology = molecule_topology(["O", "H", "H"], [(0, 1), (0, 2)], "WAT")
    file = tmp_path / "water.xml"
    write_force_field(file, topology, charges)
    system = app.ForceField(str(file)).createSystem(topology)
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    read = [force.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge) for i in range(3)]
    np.testing.assert_allclose(read, charges, atol=2e-6)
    assert sum(read) == pytest.approx(0.0, abs=1e-9)
    assert force.getParticleParameters(0)[1].value_in_unit(unit.angstrom) == pytest.approx(3.118, abs=1e-3)
    assert force.getNumExceptions() == 3

    other = molecule_topology(["O", "H", "H"], [(0, 1), (0, 2)], "WAT")
    chain = other.addChain()
    other.addResidue("WAT", chain)
    for bad, values, message in (
        (other, charges, "2 residues"),
        (topology, charges[:2], "as many finite charges"),
        (molecule_topology(["Na"], []), [1.0], "no parameters"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            write_force_field(file, bad, values)
