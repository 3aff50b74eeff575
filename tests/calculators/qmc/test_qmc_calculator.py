"""The ASE calculator, its files and the command, as users meet them."""

import json
import shutil

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError, InputError, PropertyNotImplementedError
from ase.io.cube import read_cube_data
from ase.units import Bohr, Hartree
from pyscf.tools import cubegen
from typer.testing import CliRunner

from flowbridge.calculators import QMCCalculator
from flowbridge.calculators.qmc.calculator import molecule_of
from flowbridge.calculators.qmc.density.densities import SumDensity
from flowbridge.calculators.qmc.files import read_file, write_file
from flowbridge.calculators.qmc.storage import (
    load_density,
    load_samples,
    load_wave_function,
    save_density,
    save_samples,
    save_wave_function,
)
from flowbridge.commands.application import application
from flowbridge.core.errors import ConfigurationError, ConvergenceError, ModelFileError, MoleculeMismatchError

QUICK = {
    "walkers": 64, "sweeps": 9, "interval": 3, "equilibration": 50, "iterations": 1, "optimisation_sweeps": 4,
    "basis": "cc-pvdz",
}  # fmt: skip


@pytest.fixture(scope="module")
def hydrogen_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("h2")


@pytest.fixture(scope="module")
def hydrogen(hydrogen_folder):
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.741]])
    atoms.center(vacuum=2.5)
    atoms.calc = QMCCalculator(directory=hydrogen_folder, forces="hellmann-feynman", **QUICK)
    atoms.get_potential_energy()
    return atoms


def test_standard_properties_with_errors_in_ases_units(hydrogen):
    calculator = hydrogen.calc
    assert calculator.implemented_properties == ["energy", "free_energy", "dipole", "charges", "magmom", "forces"]
    assert hydrogen.get_potential_energy() == pytest.approx(-1.16 * Hartree, abs=0.05 * Hartree)
    assert hydrogen.get_potential_energy(force_consistent=True) == hydrogen.get_potential_energy()
    assert 0.0 < calculator.errors["energy"] < 0.03 * Hartree
    assert np.abs(hydrogen.get_dipole_moment()).max() < 5 * calculator.errors["dipole"].max() + 1e-3
    assert hydrogen.get_charges().sum() == pytest.approx(0.0, abs=1e-6)
    assert hydrogen.get_magnetic_moment() == 0.0
    assert "forces" not in calculator.results
    forces = hydrogen.get_forces()
    np.testing.assert_allclose(forces[:, :2], 0.0, atol=1e-6)
    np.testing.assert_allclose(forces.sum(0), calculator.get_net_force().value, atol=1e-9)
    np.testing.assert_allclose(forces, calculator.properties.forces().value * Hartree / Bohr)
    assert calculator.errors["forces"].shape == (2, 3)
    assert calculator.get_contact_densities().value.shape == (2,)
    assert np.trace(calculator.get_quadrupole().value) == pytest.approx(0.0, abs=1e-9)
    potential = calculator.get_electrostatic_potential(hydrogen.positions.mean(0) + np.diag([2.0, 0, 2.5])[[0, 2]])
    assert potential.value[0] < 0.0 < potential.value[1]  # the quadrupole of H2
    assert calculator.check_state(hydrogen) == []


def test_results_are_kept_and_found_again(hydrogen, hydrogen_folder, tmp_path):
    names = {path.name.split("-")[0] for path in hydrogen_folder.iterdir()}
    assert names == {"wave_function", "samples", "density"}
    announced = []
    same = hydrogen.copy()
    same.calc = QMCCalculator(directory=hydrogen_folder, announce=announced.append, **QUICK)
    assert same.get_potential_energy() == hydrogen.get_potential_energy()
    np.testing.assert_array_equal(same.get_dipole_moment(), hydrogen.get_dipole_moment())
    assert announced == []

    # A damaged file is recomputed, from what is still there, to the same numbers; the generator's state is in it.
    shutil.copytree(hydrogen_folder, tmp_path / "damaged")
    (samples,) = (tmp_path / "damaged").glob("samples-*")
    samples.write_bytes(samples.read_bytes()[:5000])
    (density,) = (tmp_path / "damaged").glob("density-*")
    density.unlink()
    same.calc = QMCCalculator(directory=tmp_path / "damaged", **QUICK)
    assert same.get_potential_energy() == hydrogen.get_potential_energy()
    np.testing.assert_allclose(same.get_dipole_moment(), hydrogen.get_dipole_moment(), atol=1e-12)
    same.calc = QMCCalculator(seed=2, **QUICK)
    assert same.get_potential_energy() != hydrogen.get_potential_energy()


def test_density_on_the_cell_and_in_cube_files(hydrogen, tmp_path):
    calculator = hydrogen.calc
    density = calculator.get_pseudo_density(spacing=0.2)
    volume = hydrogen.get_volume() / density.size
    assert density.sum() * volume == pytest.approx(2.0, rel=0.02)
    place = hydrogen.positions[0] + [0.0, 0.3, 0.1]
    point = torch.as_tensor(place / Bohr)[None]
    index = np.round(place / hydrogen.cell.lengths() * density.shape).astype(int)
    near = index * hydrogen.cell.lengths() / density.shape
    expected = float(calculator.density.rho(torch.as_tensor(near / Bohr)[None])[0]) / Bohr**3
    assert density[tuple(index)] == pytest.approx(expected)
    assert float(calculator.density.rho(point)[0]) > 0.0

    file = tmp_path / "h2.cube"
    calculator.write_cube(file, spacing=0.25)
    data, atoms = read_cube_data(str(file))
    np.testing.assert_allclose(atoms.positions, hydrogen.positions, atol=1e-5)
    assert data.sum() * hydrogen.get_volume() / Bohr**3 / data.size == pytest.approx(2.0, rel=0.03)
    mole = calculator.run.optimisation.wave_function.molecule
    from flowbridge.calculators.qmc.electronic_structure import pyscf_molecule

    read = cubegen.Cube(pyscf_molecule(mole)).read(str(file))
    np.testing.assert_allclose(read, data, rtol=1e-4, atol=1e-9)

    without = Atoms("H2", hydrogen.positions)
    with pytest.raises(InputError, match=r"needs a cell: call atoms\.center"):
        calculator.get_pseudo_density(without)
    with pytest.raises(InputError, match="spin 0 has no density"):
        calculator.get_pseudo_density(spin=0)
    with pytest.raises(ConfigurationError, match="must be positive"):
        calculator.get_pseudo_density(spacing=0.0)


def test_open_shells_have_spin_densities():
    atoms = Atoms("Li", magmoms=[1.0])
    atoms.center(vacuum=4.0)
    atoms.calc = QMCCalculator(**QUICK)
    assert atoms.get_potential_energy() == pytest.approx(-7.45 * Hartree, abs=0.15 * Hartree)
    assert atoms.get_magnetic_moment() == 1.0
    density = atoms.calc.density
    assert isinstance(density, SumDensity)
    assert (density.up.electrons, density.down.electrons) == (2.0, 1.0)
    grid = atoms.calc.run.grid
    for part, count in ((density.up, 2.0), (density.down, 1.0)):
        assert float((part.rho(grid.points) * grid.weights).sum()) == pytest.approx(count, abs=1e-6)
    up, down, both = (atoms.calc.get_pseudo_density(spin=spin, spacing=0.5) for spin in (0, 1, None))
    np.testing.assert_allclose(up + down, both, rtol=1e-9)


def test_what_cannot_be_computed_is_refused(hydrogen):
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.741]], cell=[5, 5, 5], pbc=[False, False, True])
    atoms.calc = QMCCalculator(**QUICK)
    with pytest.raises(InputError, match=r"set atoms\.pbc = False"):
        atoms.get_potential_energy()
    atoms.pbc = False
    with pytest.raises(PropertyNotImplementedError, match="asked for by name"):
        atoms.get_forces()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    for change, message in (
        ({"spin": 1}, "cannot have 1 more"),
        ({"charge": 2}, "leaves 0 electrons"),
    ):
        atoms.calc = QMCCalculator(**{**QUICK, **change})
        with pytest.raises(InputError, match=message):
            atoms.get_potential_energy()
    close = Atoms("H2", [[0, 0, 0], [0, 0, 0.05]])
    close.calc = QMCCalculator(**QUICK)
    with pytest.raises(InputError, match="on top of each other"):
        close.get_potential_energy()
    for bad, message in (
        ({"walker": 5}, "unknown parameters walker"),
        ({"walkers": 2}, "at least 32 walkers"),
        ({"model": "gaussian"}, "density model must be one of"),
        ({"forces": True}, "hellmann-feynman"),
        ({"partition": "mulliken"}, "partition must be one of"),
        ({"orbitals": "b3lyp"}, "orbitals must be one of"),
    ):
        with pytest.raises(CalculatorSetupError, match=message):
            QMCCalculator(**bad)
    with pytest.raises(InputError, match="nothing was calculated yet"):
        _ = QMCCalculator().density


def test_charge_and_spin_come_from_the_atoms():
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], magmoms=[1.0, 0.0])
    assert molecule_of(atoms).spin == 1
    atoms.set_initial_charges([-1.0, 0.0])
    atoms.set_initial_magnetic_moments([0.0, 0.0])
    assert (molecule_of(atoms).charge, molecule_of(atoms).spin, molecule_of(atoms).electrons) == (-1, 0, 10)
    assert molecule_of(atoms, 0).spin == 1
    atoms.set_initial_charges([-0.5, 0.0])
    with pytest.raises(ConfigurationError, match=r"add up to -0\.5"):
        molecule_of(atoms)


def test_files_come_back_as_they_were_and_strange_ones_are_refused(hydrogen, tmp_path, h2, lih):
    run = hydrogen.calc.run
    points = run.grid.points[::500]
    save_density(tmp_path / "density", run.density)
    read = load_density(tmp_path / "density")
    torch.testing.assert_close(read.with_replicas(points), run.density.with_replicas(points), rtol=1e-13, atol=0.0)
    save_wave_function(tmp_path / "wave", run.wave_function)
    electrons = run.samples.positions[0, :5]
    torch.testing.assert_close(
        load_wave_function(tmp_path / "wave").local_energy(electrons).total,
        run.wave_function.local_energy(electrons).total,
    )
    save_samples(tmp_path / "samples", run.samples)
    assert torch.equal(load_samples(tmp_path / "samples").scores, run.samples.scores)

    with pytest.raises(MoleculeMismatchError, match="belongs to another molecule"):
        load_wave_function(tmp_path / "wave", lih)
    with pytest.raises(ModelFileError, match="holds a density, and a samples is needed"):
        load_samples(tmp_path / "density")
    with pytest.raises(ModelFileError, match="no such file"):
        load_density(tmp_path / "nothing")
    blob = bytearray((tmp_path / "density").read_bytes())
    (tmp_path / "short").write_bytes(blob[:-10])
    with pytest.raises(ModelFileError, match="truncated"):
        load_density(tmp_path / "short")
    blob[-3] ^= 1
    (tmp_path / "altered").write_bytes(blob)
    with pytest.raises(ModelFileError, match="was altered"):
        load_density(tmp_path / "altered")
    with pytest.raises(ModelFileError, match="NaN"):
        write_file(tmp_path / "nan", "density", {}, {"x": torch.tensor([float("nan")])})
    write_file(tmp_path / "poor", "samples", {"molecule": h2.to_dict()}, {"positions": torch.zeros(1)})
    with pytest.raises(ModelFileError, match="lacks something"):
        load_samples(tmp_path / "poor")
    content, tensors = read_file(tmp_path / "samples", "samples")
    assert set(tensors) == {"positions", "scores", "kinetic", "potential", "log_absolute"}
    assert content["molecule"]["numbers"] == [1, 1]


def test_samples_and_wave_functions_of_files(hydrogen, tmp_path):
    save_samples(tmp_path / "samples", hydrogen.calc.samples)
    save_wave_function(tmp_path / "wave", hydrogen.calc.wave_function)
    other = hydrogen.copy()
    other.calc = QMCCalculator(samples=tmp_path / "samples", **QUICK)
    assert other.get_potential_energy() == hydrogen.get_potential_energy()
    assert abs(other.get_dipole_moment()[2]) < 0.1
    dipole, charges = other.get_dipole_moment(), other.get_charges()
    other.positions += [1.0, -0.5, 0.3]  # a molecule may have been moved since
    assert other.get_potential_energy() == hydrogen.get_potential_energy()
    np.testing.assert_allclose(other.get_dipole_moment(), dipole, atol=1e-6)
    np.testing.assert_allclose(other.get_charges(), charges, atol=1e-6)
    other.calc = QMCCalculator(wave_function=tmp_path / "wave", **QUICK)
    energy = other.get_potential_energy()
    assert energy != hydrogen.get_potential_energy()
    assert abs(energy - hydrogen.get_potential_energy()) < 6 * other.calc.errors["energy"]
    stretched = hydrogen.copy()
    stretched.positions[1, 2] += 0.1
    stretched.calc = other.calc
    with pytest.raises(MoleculeMismatchError, match="another molecule"):
        stretched.get_potential_energy()


def test_what_was_computed_before_an_error_is_kept(tmp_path, monkeypatch):
    from flowbridge.calculators.qmc.wave_function import sampling

    monkeypatch.setattr(sampling, "_DRIFT_LIMIT", 1e-9)
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.741]])
    atoms.calc = QMCCalculator(directory=tmp_path, **QUICK)
    with pytest.raises(ConvergenceError, match="not in equilibrium") as caught:
        atoms.get_potential_energy()
    assert caught.value.samples.kinetic.shape == (9, 64)
    assert list(tmp_path.glob("wave_function-*"))
    (kept,) = tmp_path.glob("not-in-equilibrium-*")
    assert torch.equal(load_samples(kept).kinetic, caught.value.samples.kinetic)


def test_density_command(tmp_path):
    structure = tmp_path / "h2.xyz"
    ase.io.write(structure, Atoms("H2", [[0, 0, 0], [0, 0, 0.741]]))
    arguments = [
        "density", str(structure), "--walkers", "64", "--sweeps", "6", "--iterations", "1", "--basis", "cc-pvdz",
        "--reference", "hf", "--spacing", "0.3", "--force-field", str(tmp_path / "h2.xml"), "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    assert "charge (potential) of H1" in done.output
    assert '<Bond atomName1="H1" atomName2="H2"' in (tmp_path / "h2.xml").read_text()
    for word in ("energy", "dipole z", "contact density of H0", "net force", "Hartree-Fock"):
        assert word in done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "results.json",
        "report.html",
        "h2.png",
        "h2.cube",
        "h2.density.safetensors",
        "h2.wave_function.safetensors",
    } <= written
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["properties"]}
    assert rows["energy"]["value"] == pytest.approx(-1.15, abs=0.1)
    assert rows["energy"]["error"] > 0.0
    density = load_density(tmp_path / "out/h2.density.safetensors")
    assert density.electrons == 2.0
    assert (tmp_path / "out/h2.png").read_bytes().startswith(b"\x89PNG")

    for wrong, message in (
        (["density", str(tmp_path / "nothing.xyz")], "ASE cannot read it"),
        (["density", str(structure), "--charge", "2"], "leaves 0 electrons"),
        (["density", str(structure), "--reference", "pbe"], "must be hf, ccsd or none"),
    ):
        done = CliRunner().invoke(application, [*wrong, "--output", str(tmp_path / "refused")])
        assert done.exit_code == 1
        assert message in done.output.replace("\n", " ")
