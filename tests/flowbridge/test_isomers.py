"""Databases of relaxed isomers: complete, checked, resumable; and what cannot be made or read says why."""

import pytest
from ase.db import connect
from ase.units import nm

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.execution.executors import ProcessExecutor
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.workflows.molecules.isomer_database import (
    IsomerRequest,
    formulas_of_heavy_atoms,
    make_isomers,
    read_isomers,
)

pytest.importorskip("tblite")

ALCOHOLS = IsomerRequest((Formula.parse("C3H8O"), Formula.parse("C2H6O")), vibrations=1.0)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("isomers") / "alcohols.db"
    return path, make_isomers(ALCOHOLS, path)


def test_all_isomers_are_there_at_minima(database):
    path, counts = database
    assert {isomer.smiles for isomer in read_isomers(path)} == {"CCO", "COC", "CCCO", "CC(C)O", "CCOC"}
    assert counts == (5, {}, 5, 0)


def test_energies_order_as_is_known(database):
    energies = {isomer.smiles: isomer.energy for isomer in read_isomers(database[0])}
    assert energies["CCO"] < energies["COC"]
    assert energies["CC(C)O"] < energies["CCCO"] < energies["CCOC"]


def test_rows_are_what_ase_shows(database):
    with connect(database[0]) as rows:
        row = rows.get(smiles="CCO")
        assert sorted(row.numbers) == [1] * 6 + [6, 6, 8]
        assert rows.metadata["request"]["calculator"] == "gfn2"
        assert "tblite" in rows.metadata["software"]
    atoms = row.toatoms()
    assert atoms.get_potential_energy() == pytest.approx(row.energy)
    assert 1.0 < atoms.get_distance(0, 1) < 1.6
    (isomer,) = (isomer for isomer in read_isomers(database[0]) if isomer.smiles == "CCO")
    assert isomer.positions == pytest.approx(atoms.positions / nm)


def test_a_stopped_run_goes_on_to_the_same(database, tmp_path):
    path = tmp_path / "alcohols.db"

    def stopping(function, jobs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_isomers(ALCOHOLS, path, stopping)
    part = IsomerRequest(ALCOHOLS.formulas[1:], vibrations=1.0)
    make_isomers(part, path, ProcessExecutor(1))
    assert len(read_isomers(path)) == 2
    make_isomers(ALCOHOLS, path)
    again, before = ({i.smiles: i.energy for i in read_isomers(file)} for file in (path, database[0]))
    assert again == pytest.approx(before, abs=1e-9)

    def nothing_to_do(function, jobs):
        assert not jobs
        return iter(())

    assert make_isomers(ALCOHOLS, path, nothing_to_do).kept == 5


def test_failures_are_counted_and_not_tried_again(tmp_path):
    request = IsomerRequest((Formula.parse("C2H6O"),), calculator="calculators_that_fail:not_a_number")
    counts = make_isomers(request, tmp_path / "none.db")
    assert counts.kept == 0
    assert counts.failed == {"forces are not finite": 2}
    with pytest.raises(ConfigurationError, match="holds no molecules"):
        read_isomers(tmp_path / "none.db")


def test_samples_are_of_the_size_asked_and_repeat(tmp_path):
    request = IsomerRequest((Formula.parse("C3H6O"),), per_formula=2)
    for name in "ab":
        make_isomers(request, tmp_path / f"{name}.db")
    first, second = ([i.smiles for i in read_isomers(tmp_path / f"{name}.db")] for name in "ab")
    assert first == second
    assert len(first) == 2


def test_databases_that_cannot_be_used(database, tmp_path):
    with pytest.raises(ConfigurationError, match="was made with"):
        make_isomers(IsomerRequest(ALCOHOLS.formulas, seed=2), database[0])
    with pytest.raises(ConfigurationError, match="no formulas"):
        make_isomers(IsomerRequest(()), tmp_path / "x.db")
    with pytest.raises(ConfigurationError, match="no database"):
        read_isomers(tmp_path / "missing.db")
    (tmp_path / "text.db").write_text("no database at all " * 100)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_isomers(tmp_path / "text.db")


def test_formulas_within_limits():
    found = formulas_of_heavy_atoms((1, 2), {"O": 1}, 1)
    assert {str(formula) for formula in found} == {"CH4", "C2H6", "C2H4", "CH4O", "CH2O"}
