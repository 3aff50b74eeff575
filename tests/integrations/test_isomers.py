"""Enumerated isomers: numbers that are known, and graphs that are what they should be."""

import re

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from flowbridge.core.errors import ConfigurationError, CoordinateError
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.integrations.rdkit.isomers import enumerate_isomers
from flowbridge.integrations.rdkit.molecular_graphs import canonical_smiles, draw_svg, embed, molecule_of, write_sdf


@pytest.mark.parametrize(
    ("formula", "count"),
    [
        ("CH4", 1), ("C4H10", 2), ("C5H12", 3), ("C6H14", 5), ("C7H16", 9), ("C3H8O", 3), ("C4H10O", 7), ("C2H6O", 2),
        ("C3H9N", 4), ("C3H6O", 9), ("C4H6", 9), ("C4H8O", 26), ("C5H8", 26), ("C5H10", 10), ("C6H12", 25), ("C6H6", 217),
    ],
)  # fmt: skip
def test_known_numbers_of_isomers(formula, count):
    """Numbers of structural isomers as given by MOLGEN and in textbooks; benzene's 217 hold it once."""
    assert len(enumerate_isomers(Formula.parse(formula))) == count


def test_isomers_have_the_formula_and_are_distinct():
    isomers = enumerate_isomers(Formula.parse("C3H5NO"))
    molecules = [Chem.MolFromSmiles(smiles) for smiles in isomers]
    assert {CalcMolFormula(molecule) for molecule in molecules} == {"C3H5NO"}
    assert len({Chem.MolToInchi(molecule, "/FixedH") for molecule in molecules}) == len(isomers)
    assert {"C=CC(N)=O", "CCN=C=O"} <= set(isomers)


def test_pyridine_is_there_once():
    assert [smiles for smiles in enumerate_isomers(Formula.parse("C4H4N2")) if smiles.islower()].count("c1cnccn1") == 1


def test_no_heavy_atoms():
    with pytest.raises(ConfigurationError, match="no heavy atoms"):
        enumerate_isomers(Formula.parse("H2"))


@pytest.mark.parametrize(
    "smiles", ["CCO", "C#CC(=O)N", "c1ccccc1", "C1=CC=C1", "CC(F)C#N", "O=C=O", "c1ccoc1", "N#CC1=CNC=C1"]
)
def test_bonds_of_a_structure_give_the_molecule_back(smiles):
    structure = embed(smiles, seed=1)
    turned = structure.positions @ np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    found = find_bonds(structure.numbers, turned)
    assert found.fault is None
    assert canonical_smiles(structure.numbers, found.bonds) == Chem.CanonSmiles(smiles)


@pytest.mark.parametrize(
    ("numbers", "positions", "fault"),
    [
        ([6, 1, 1, 1], [[0, 0, 0], [0.109, 0, 0], [-0.05, 0.09, 0], [-0.05, -0.09, 0]], "radicals or charges"),
        ([1, 1, 1, 1], [[0, 0, 0], [0.074, 0, 0], [1, 0, 0], [1.074, 0, 0]], "several molecules"),
        ([1, 1, 1], [[0, 0, 0], [0.074, 0, 0], [-0.074, 0, 0]], "atom 0 .* 2 neighbours"),
        ([1, 1], [[0, 0, 0], [np.nan, 0, 0]], "not finite"),
        ([6, 8], [[0, 0, 0], [0.113, 0, 0]], "radicals or charges"),
    ],
)
def test_what_is_no_valid_molecule_says_why(numbers, positions, fault):
    found = find_bonds(numbers, positions)
    assert not found.bonds
    assert re.search(fault, found.fault)


def test_no_structure_and_no_smiles():
    with pytest.raises(ConfigurationError, match="cannot read"):
        embed("C1CC", 1)
    with pytest.raises(ConfigurationError, match="cannot read"):
        draw_svg("nonsense")
    with pytest.raises(CoordinateError):
        molecule_of([9, 9, 9], [(0, 1, 1), (1, 2, 1)])


def test_files_of_molecules_are_read_back(tmp_path):
    structure = embed("CC(N)=O", 3)
    bonds = find_bonds(structure.numbers, structure.positions).bonds
    molecule = molecule_of(structure.numbers, bonds, structure.positions)
    write_sdf(str(tmp_path / "made.sdf"), [(molecule, {"energy_eV": -1.5})])
    (back,) = Chem.SDMolSupplier(str(tmp_path / "made.sdf"), removeHs=False)
    assert Chem.MolToSmiles(Chem.RemoveHs(back)) == "CC(N)=O"
    assert back.GetDoubleProp("energy_eV") == -1.5
    assert np.allclose(back.GetConformer().GetPositions() / 10, structure.positions, atol=1e-5)
    assert draw_svg("CC(N)=O").startswith("<svg")
