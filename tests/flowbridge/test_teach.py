"""``flowbridge teach``: from a database to a model file, reinforced or not, and on from where it stopped."""

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from flowbridge.commands.application import application
from flowbridge.core.model_files.files import read_header
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.workflows.molecules.building import BuildRequest, build_isomers, load_builder
from flowbridge.workflows.molecules.isomer_database import IsomerRequest, make_isomers

pytest.importorskip("tblite")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("teach") / "isomers.db"
    make_isomers(IsomerRequest((Formula.parse("CH4O"), Formula.parse("CH2O"))), path)
    return path


def run(*arguments):
    return CliRunner().invoke(application, ["teach", *(str(argument) for argument in arguments)])


def test_imitation_and_reinforcement(database, tmp_path):
    output = tmp_path / "taught.flow"
    options = ["--steps", 20, "--width", 16, "--reinforce", "CH4O", "--rounds", 2, "--molecules", 8, "--output", output]
    result = run(database, *options)
    assert result.exit_code == 0, result.output
    assert "round 2: reward" in result.output
    _, taught = load_builder(output)
    assert taught.smiles == {"CO", "C=O"}
    assert {formula: len(rows) for formula, rows in taught.geometries.items()} == {"CH4O": 1, "CH2O": 1}
    header = read_header(output)
    assert header.provenance["reinforced_on"] == ["CH4O"]
    assert header.kind == "molecule_builder"
    again = run(database, *options)  # from its checkpoints
    assert again.output == result.output
    assert load_builder(output)[0].settings.width == 16
    results = tmp_path / "built"
    build_isomers(BuildRequest("CH4O", results, count=2, model=output))
    assert json.loads((results / "results.json").read_text())["built"] == 2


@pytest.mark.parametrize(("options", "scale"), [((), 2.0), (("--relax",), 1.0)])
def test_rewards_of_relaxed_molecules_take_more_evaluations(tmp_path, options, scale):
    output = tmp_path / "reinforced.flow"
    result = run("--reinforce", "CH4O", "--rounds", 1, "--molecules", 4, "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert read_header(output).provenance["reinforcement"]["energy_scale"] == scale
    with sqlite3.connect(output.with_suffix(".evaluations.sqlite")) as kept:
        rows = kept.execute("SELECT evaluations FROM evaluations WHERE energy IS NOT NULL").fetchall()
    assert rows
    assert all((evaluations > 1) == bool(options) for (evaluations,) in rows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to learn from"),
        (["missing.db"], "there is no database"),
        (["--reinforce", "CH3"], "radical"),
    ],
)
def test_what_cannot_be_learned_from(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert reason in result.output
