"""MMFF94 in OpenMM: RDKit's energies and forces, term by term together, for molecules with every kind of term."""

import numpy as np
import openmm
import pytest
from openmm import unit
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from flowbridge.core.errors import ConfigurationError
from flowbridge.integrations.openmm.systems.mmff import mmff_system, mmff_topology
from flowbridge.integrations.rdkit.molecular_graphs import embed

CASES = ["CCO", "CC(N)=O", "N#CCC=C", "c1ccoc1", "C1CC1F", "C#CC=NO", "OC1CCN1", "C1=CCC1=O", "NC=C=C", "O=C=O"]


@pytest.mark.parametrize("smiles", CASES)
def test_energies_and_forces_are_rdkits(smiles):
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    shape = embed(smiles, 1).positions
    system = mmff_system(molecule)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    random = np.random.default_rng(1)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    for _ in range(3):
        positions = shape + 0.006 * random.standard_normal(shape.shape)
        conformer = Chem.Conformer(molecule.GetNumAtoms())
        conformer.SetPositions(positions * 10)
        molecule.RemoveAllConformers()
        molecule.AddConformer(conformer)
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties)
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilocalories_per_mole)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilocalories_per_mole / unit.angstrom)
        assert energy == pytest.approx(field.CalcEnergy(), rel=1e-4, abs=1e-3)
        expected = -np.array(field.CalcGrad()).reshape(-1, 3)
        assert np.asarray(forces) == pytest.approx(expected, rel=2e-3, abs=0.1)


def test_topology_has_the_bonds_and_the_system_is_stored():
    molecule = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    topology = mmff_topology(molecule)
    assert topology.getNumAtoms() == 9
    assert topology.getNumBonds() == 8
    assert len({atom.name for atom in topology.atoms()}) == 9
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(mmff_system(molecule)))
    assert again.getNumForces() == 7


def test_no_parameters():
    with pytest.raises(ConfigurationError, match="no parameters"):
        mmff_system(Chem.AddHs(Chem.MolFromSmiles("C[Al](C)C")))
