"""``flowbridge build``: what it writes is what it found; what cannot be built says why; nothing is evaluated twice."""

import json
import re

import ase.io
import numpy as np
import openmm
import pytest
from ase.db import connect
from ase.units import nm
from openmm import unit
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.training.evaluation import Evaluation
from flowbridge.workflows.boltzmann.configuration import read_workflow
from flowbridge.workflows.boltzmann.molecular_system import molecular_system
from flowbridge.workflows.molecules.building import BuildRequest, build_isomers, load_builder, load_isomers
from flowbridge.workflows.molecules.isomer_database import read_isomers
from flowbridge.workflows.molecules.novelty import Taught
from flowbridge.workflows.molecules.results import IsomerResults
from flowbridge.workflows.stages import StageFolder

pytest.importorskip("tblite")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    results = build_isomers(BuildRequest("C2H5NO", folder, count=24, seed=3))
    (stage,) = (folder / "stages").glob("relax-*")
    return folder, load_isomers(StageFolder("relax", "", stage)), results


def test_each_isomer_is_relaxed_once(built):
    _, ranked, results = built
    assert results["built"] == 24
    assert results["valid_as_built"] >= 12
    assert results["valid_as_built"] + sum(results["faults_as_built"].values()) == 24
    assert results["relaxed"] <= results["isomers_as_built"] < results["valid_as_built"]
    assert results["valid"] >= 0.8 * results["relaxed"]
    assert results["valid"] + sum(results["faults"].values()) == results["relaxed"]
    assert sum(isomer.times for isomer in ranked) <= 24
    assert max(isomer.times for isomer in ranked) > 1


def test_isomers_are_relaxed_valid_and_ranked(built):
    folder, ranked, _ = built
    energies = [isomer.energy for isomer in ranked]
    assert energies == sorted(energies)
    for isomer in ranked:
        assert CalcMolFormula(Chem.MolFromSmiles(isomer.smiles)) == "C2H5NO"
        assert find_bonds(isomer.numbers, isomer.positions).fault is None
    from tblite.ase import TBLite

    (best,) = ase.io.read(f"{folder / 'isomers.db'}@rank=1")
    stored = best.get_potential_energy()
    best.calc = TBLite(method="GFN2-xTB", verbosity=0)
    assert best.get_potential_energy() == pytest.approx(stored, abs=1e-6)
    assert np.abs(best.get_forces()).max() < 0.06


def test_files_hold_the_same_isomers(built):
    folder, ranked, _ = built
    ranking = [isomer.smiles for isomer in ranked]
    assert [isomer.smiles for isomer in read_isomers(folder / "isomers.db")] == ranking
    molecules = list(Chem.SDMolSupplier(str(folder / "isomers.sdf"), removeHs=False))
    assert [molecule.GetProp("SMILES") for molecule in molecules] == ranking
    assert [Chem.MolToSmiles(Chem.RemoveHs(molecule), isomericSmiles=False) for molecule in molecules] == ranking
    results = json.loads((folder / "results.json").read_text())
    assert [entry["smiles"] for entry in results["ranking"]] == ranking
    with connect(folder / "isomers.db") as rows:
        positions = rows.get(rank=1).positions
    assert molecules[0].GetConformer().GetPositions() == pytest.approx(positions, abs=1e-3)
    assert positions == pytest.approx(ranked[0].positions * nm)


def test_page_shows_every_isomer(built):
    page = (built[0] / "report.html").read_text()
    assert page.count("<svg") == 2 * len(built[1])
    assert not re.search(r'(src|href)="http', page)  # loads nothing
    assert "C₂H₅NO" in page
    assert page.count('class="mark"') == sum(isomer.novel for isomer in built[1])


def test_isomers_go_on_into_workflows(built):
    """Each is the molecule of a workflow, whose System is at rest near the geometry that was found."""
    folder, ranked, _ = built
    files = sorted((folder / "workflows").glob("*.toml"))
    without = json.loads((folder / "results.json").read_text())["without_mmff_parameters"]
    assert len(files) + len(without) == len(ranked)
    workflow = read_workflow(files[0])
    molecule = molecular_system(workflow, files[0].parent)
    rank = int(files[0].stem.rpartition("_")[2])
    isomer = ranked[rank - 1]
    assert workflow.molecule.name == isomer.smiles
    assert molecule.topology.getNumBonds() == len(isomer.bonds)
    assert molecule.positions == pytest.approx(isomer.positions, abs=1e-3)
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    relaxed = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    assert find_bonds(isomer.numbers, relaxed).bonds == isomer.bonds


def test_again_nothing_is_evaluated(built):
    folder, ranked, results = built
    assert build_isomers(BuildRequest("C2H5NO", folder, count=24, seed=3)) == results
    # A relaxation that was killed at its end finds every energy.
    (stage,) = (folder / "stages").glob("relax-*")
    (stage / "results.json").unlink()
    again = build_isomers(BuildRequest("C2H5NO", folder, count=24, seed=3))
    assert again["evaluations"] == 0
    assert [isomer["smiles"] for isomer in again["ranking"]] == [isomer.smiles for isomer in ranked]


def test_novelty_is_about_what_the_builder_was_taught():
    _, shipped = load_builder(None)
    assert len(shipped.smiles) > 1000
    assert sum(len(rows) for rows in shipped.geometries.values()) >= len(shipped.smiles)
    positions = np.array([[0, 0, 0], [0.092, 0, 0]])
    for taught, novel in (("F", False), ("C", True)):
        for length, novel_geometry in ((0.09205, False), (0.1, True)):
            found = IsomerResults(Taught.of([(taught, [1, 9], [[0, 0, 0], [0, length, 0]])]))
            assert found.add([9, 1], Evaluation(-1.0, positions, 3)) == "F"
            assert (found.ranked[0].novel, found.ranked[0].novel_geometry) == (novel, novel_geometry)


def test_results_keep_the_best_geometry_and_count_reasons():
    found = IsomerResults()
    for energy, length in ((-1.0, 0.092), (-1.5, 0.093), (-1.2, 0.094)):
        found.add([9, 1], Evaluation(energy, np.array([[0, 0, 0], [length, 0, 0]]), 2))
    found.add([9, 1], Evaluation(None, np.zeros((2, 3)), 1, "atoms 0 and 1 are 0.001 nm apart"))
    found.add([9, 1], Evaluation(-9.0, np.array([[0, 0, 0], [0.5, 0, 0]]), 1))
    (isomer,) = found.ranked
    assert (isomer.energy, isomer.times, isomer.positions[1, 0]) == (-1.5, 3, 0.093)
    assert found.faults == {"atoms are on top of each other": 1, "the atoms fall apart into several molecules": 1}
    assert (found.valid, found.evaluated, found.evaluations) == (3, 5, 8)


def test_a_calculator_that_always_fails_leaves_a_page_that_says_so(tmp_path):
    request = BuildRequest("H2O", tmp_path, count=3, calculator="calculators_that_fail:raising")
    assert not build_isomers(request)["ranking"]
    assert "no self-consistency" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["isomers"] == 0


class TestCommand:
    def test_it_prints_and_writes(self, tmp_path):
        result = CliRunner().invoke(application, ["build", "CH4O", "--n", "2", "--output", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "of 2 molecules valid as built" in result.output
        assert (tmp_path / "report.html").is_file()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["CH3"], "radical"),
            (["NH4+"], "charged"),
            (["C2H6S"], "has S"),
            (["CH4", "--calculator", "gfn9"], "no calculator"),
            (["CH4", "--model", "missing.flow"], "no such model file"),
        ],
    )
    def test_what_cannot_be_built_is_one_line(self, tmp_path, monkeypatch, arguments, reason):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(application, ["build", *arguments])
        assert result.exit_code == 1
        assert reason in result.output
        assert "Traceback" not in result.output

    def test_isomers_command(self, tmp_path):
        file = tmp_path / "isomers.db"
        result = CliRunner().invoke(
            application, ["isomers", "CH4O", "CH2O", "--output", str(file), "--vibrations", "1"]
        )
        assert result.exit_code == 0, result.output
        assert "2 relaxed isomers of 2 formulas" in result.output
        result = CliRunner().invoke(application, ["isomers", "--output", str(file)])
        assert result.exit_code == 1
        assert "--heavy-atoms" in result.output


def test_a_model_of_another_kind(tmp_path, shared_morse_file):
    with pytest.raises(ConfigurationError, match="not a builder"):
        build_isomers(BuildRequest("CH4", tmp_path, model=shared_morse_file))
