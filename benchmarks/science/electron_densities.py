"""Electron densities of small molecules by quantum Monte Carlo, next to exact and coupled-cluster values.

    python -m benchmarks.science.electron_densities             # all cases, hours
    python -m benchmarks.science.electron_densities He H2 LiH   # some of them
    python -m benchmarks.science.electron_densities --table     # what was measured so far

Each case keeps its checkpoints in runs/electron_densities and its result in benchmarks/results/electron_densities.json. An
interrupted case continues, a finished one is not repeated without --recompute. Atomic units, dipoles in Debye where marked.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.units import Bohr, Debye
from rich.console import Console
from rich.table import Table

from flowbridge.calculators.qmc.density.densities import GaussianDensity, OrbitalDensity, SumDensity, base_density
from flowbridge.calculators.qmc.density.linear_log_density import fit_linear_log_density
from flowbridge.calculators.qmc.density_run import DensityProgress, DensityRun, RunSettings
from flowbridge.calculators.qmc.electronic_structure import mean_field, reference_density, require_pyscf
from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.properties.properties import DensityProperties
from flowbridge.calculators.qmc.wave_function.linear_method import OptimisationSettings
from flowbridge.calculators.qmc.wave_function.sampling import SamplingSettings
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings

from ..harness import RESULTS, machine
from .dissociation_figure import draw_dissociation

DEBYE = Bohr / Debye  # of one e bohr
FILE = RESULTS / "electron_densities.json"
FIGURE = Path("docs/images/lih_dissociation.png")
WORK = Path("runs/electron_densities")

H2 = Molecule.build([1, 1], [[0, 0, 0], [0, 0, 1.4]])
LIH = Molecule.build([3, 1], [[0, 0, 0], [0, 0, 3.015]])
ATOMS = {"H": (1, 1), "He": (2, 0), "Li": (3, 1), "N": (7, 3), "O": (8, 2)}
POLAR = {
    "H2O": Molecule.build([8, 1, 1], [[0, 0, 0.2217], [0, 1.4309, -0.8867], [0, -1.4309, -0.8867]]),
    "HF": Molecule.build([9, 1], [[0, 0, 0], [0, 0, 1.7325]]),
    "CO": Molecule.build([6, 8], [[0, 0, 0], [0, 0, 2.132]]),
    "NH3": Molecule.build(
        [7, 1, 1, 1],
        [[0, 0, 0.127872], [0, 1.771, -0.5922], [1.53373, -0.8855, -0.5922], [-1.53373, -0.8855, -0.5922]],
    ),
}
SEEDS = (1, 2, 3)
_AVERAGED = ("energy", "contact", "dipole", "dipole_raw", "forces", "net_force", "second_moment", "quadrupole",
             "hirshfeld")  # fmt: skip
CURVE = (2.4, 3.015, 4.0, 5.5, 8.0)  # bohr


def settings_for(small: bool, **trial: Any) -> RunSettings:
    """Return the settings of a case; small ones take seconds."""
    if small:
        return RunSettings(
            TrialSettings(**{**trial, "grid_level": 2}),
            OptimisationSettings(iterations=1, sweeps=3, equilibration=60),
            SamplingSettings(walkers=64, equilibration=60, sweeps=6, interval=3),
        )
    return RunSettings(TrialSettings(**trial), OptimisationSettings(), SamplingSettings())


def run_of(name: str, molecule: Molecule, settings: RunSettings) -> tuple[DensityRun, dict[str, Any]]:
    """Return a run with everything computed, and what all cases report."""
    console = Console(stderr=True)

    def announce(progress: DensityProgress) -> None:
        if progress.message and console.is_terminal:
            console.print(f"{name}: {progress.stage} {progress.message}", highlight=False)

    begin, processor = time.monotonic(), time.process_time()
    run = DensityRun(molecule, settings, WORK / name, announce=announce)
    energy = run.samples.energy
    found = run.properties
    contact, dipole, forces = found.contact_densities(), found.dipole(), found.forces()
    samples = run.samples
    charges = molecule.charges @ molecule.centers
    raw = [samples.average((charges - samples.positions.sum(2))[..., axis]) for axis in range(3)]
    return run, {
        "energy": list(energy),
        "variance": samples.variance,
        "acceptance": samples.acceptance,
        "correlation_sweeps": samples.correlation_sweeps(),
        "electron_samples": samples.positions[..., 0].numel(),
        "contact": [contact.value.tolist(), contact.error.tolist()],
        "dipole": [dipole.value.tolist(), dipole.error.tolist()],
        "dipole_raw": [[one.value for one in raw], [one.error for one in raw]],
        "forces": [forces.value.tolist(), forces.error.tolist()],
        "net_force": [part.tolist() for part in found.net_force()],
        "second_moment": [float(part) for part in found.second_moment()],
        "quadrupole": [part.tolist() for part in found.quadrupole()],
        "hirshfeld": [part.tolist() for part in found.hirshfeld_charges()],
        "seconds": time.monotonic() - begin,
        "cpu_seconds": time.process_time() - processor,
        "seed": settings.seed,
    }


def atom(name: str, small: bool) -> dict[str, Any]:
    """Return the case of one atom; open shells are compared with UCCSD's spin density."""
    number, spin = ATOMS[name]
    molecule = Molecule.build([number], [[0.0, 0.0, 0.0]], spin=spin)
    # One electron has no correlation, and Hartree-Fock in a large basis is all but exact.
    trial = {"orbitals": "hartree-fock", "basis": "cc-pv5z"} if number == 1 else {}
    run, result = run_of(name, molecule, settings_for(small, **trial))
    density = run.density
    if isinstance(density, SumDensity):
        begin = time.process_time()
        contact = run.spin_contact_densities
        result["spin_contact"] = [float(contact.value[0]), float(contact.error[0])]
        result["spin_contact_cpu_seconds"] = time.process_time() - begin
        grid = run.grid
        result["spin_count"] = float(
            ((density.up.rho(grid.points) - density.down.rho(grid.points)) * grid.weights).sum()
        )
        reference = reference_density(molecule, "ccsd", "aug-cc-pvqz")
        values = [
            GaussianDensity(molecule, reference.mole, matrix).rho(molecule.centers) for matrix in reference.matrices
        ]
        result["spin_contact_uccsd"] = float(values[0] - values[1])
        result["energy_uccsd"] = reference.energy
    return result


def mean_field_determinant(name: str, small: bool) -> dict[str, Any]:
    """Return the fit to samples of a Hartree-Fock determinant, whose density is known in closed form."""
    molecule = {"H2": H2, "LiH": LIH}[name.split("-")[0]]
    settings = settings_for(small, orbitals="hartree-fock", jastrow=False)
    if not small:
        sweeps = math.ceil(250_000 / (settings.sampling.walkers * molecule.electrons))
        settings = replace(settings, sampling=replace(settings.sampling, sweeps=sweeps))
    # Without the exact density as the base, or there would be nothing to fit: start from another one.
    run, result = run_of(name, molecule, settings)
    exact = base_density(run.wave_function, run.grid)
    start = base_density(
        DensityRun(molecule, settings_for(small, orbitals="natural", jastrow=False)).wave_function, run.grid
    )
    rough = _shrunken(start)
    fitted = fit_linear_log_density(run.samples, rough, run.grid, settings.fit)
    properties, truth = DensityProperties(fitted, run.grid), DensityProperties(exact, run.grid)
    forces = properties.forces()
    samples = run.samples
    away = samples.positions - molecule.centers[0]
    field = molecule.charges[0] * (away / torch.linalg.vector_norm(away, dim=3, keepdim=True) ** 3).sum(2)[..., 2]
    result |= {
        "l1_base": DensityProperties(rough, run.grid).absolute_difference(exact),
        "l1": properties.absolute_difference(exact),
        "forces": [forces.value.tolist(), forces.error.tolist()],
        "forces_exact": truth.forces().value.tolist(),
        "force_raw_error": samples.average(field).error,
        "dipole": [part.tolist() for part in properties.dipole()],
        "dipole_exact": truth.dipole().value.tolist(),
        "contact": [part.tolist() for part in properties.contact_densities()],
        "contact_exact": truth.contact_densities().value.tolist(),
    }
    return result


def _shrunken(density: Any) -> Any:
    """Return a density of the same form whose occupations are uneven by a tenth: wrong where nobody told the fit."""
    factors = torch.linspace(1.1, 0.9, len(density.occupations), dtype=torch.float64)
    if len(factors) == 1:
        factors = torch.ones(1, dtype=torch.float64)
    return OrbitalDensity(
        density.molecule, density.functions, density.coefficients, density.occupations * factors / factors.mean()
    )


def hydrogen_molecule(small: bool) -> dict[str, Any]:
    """Return H2 at 1.4 bohr, next to CCSD, which is full configuration interaction for two electrons."""
    settings = settings_for(small)
    if not small:  # its force is small, and the noise of the parameters shows in it
        settings = replace(settings, optimisation=replace(settings.optimisation, sweeps=25))
    run, result = run_of("H2", H2, settings)
    about_atom = run.properties.second_moment(0)
    result["second_moment_about_atom"] = [float(about_atom.value), float(about_atom.error)]
    reference = reference_density(H2, "ccsd", "cc-pvtz" if small else "aug-cc-pvqz")
    compared = DensityProperties(GaussianDensity.from_reference(H2, reference), run.grid)
    result["second_moment_fci"] = float(compared.second_moment(0).value)
    result["quadrupole_fci"] = float(compared.quadrupole().value[2, 2])
    return result


def lithium_hydride(small: bool) -> dict[str, Any]:
    """Return LiH at 3.015 bohr, next to CCSD."""
    settings = settings_for(small)
    if not small:  # a dipole is a global moment, and wants as many samples as a plain average
        settings = replace(settings, sampling=replace(settings.sampling, sweeps=180))
    _, result = run_of("LiH", LIH, settings)
    return result | _coupled_cluster(LIH, small)


def polar(name: str, small: bool, active_space: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a molecule with a dipole moment, next to CCSD; with an active space an expansion of determinants, three times."""
    settings = settings_for(small, active_space=active_space)
    if active_space is None:
        if not small:  # the noisier a deep core makes the local energy, the noisier are the parameters
            settings = replace(
                settings,
                optimisation=replace(settings.optimisation, sweeps=30),
                sampling=replace(settings.sampling, sweeps=120),
            )
        _, result = run_of(name, POLAR[name], settings)
        return result | _coupled_cluster(POLAR[name], small)
    if not small:
        settings = replace(settings, sampling=replace(settings.sampling, sweeps=240))
    results = []
    for seed in SEEDS:
        results.append(run_of(f"{name}-casscf", POLAR[name], replace(settings, seed=seed))[1])
        energy, dipole = results[-1]["energy"], results[-1]["dipole"]
        print(f"{name}, seed {seed}: {energy[0]:.4f}({energy[1]:.4f}) Hartree, "
              f"{dipole[0][2] * DEBYE:.3f}({dipole[1][2] * DEBYE:.3f}) D", flush=True)  # fmt: skip
    return _averaged(results) | _coupled_cluster(POLAR[name], small)


def _averaged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return averages over independent runs with the errors that each run claims for itself, and what the runs scatter by."""
    found: dict[str, Any] = {"seeds": list(SEEDS), "seed": SEEDS[0]}
    for name in _AVERAGED:
        values, errors = (np.array([result[name][part] for result in results]) for part in (0, 1))
        found[name] = [values.mean(0).tolist(), (np.sqrt(np.square(errors).sum(0)) / len(results)).tolist()]
    found["dipole_seeds"] = [result["dipole"] for result in results]
    found["dipole_scatter"] = np.std([result["dipole"][0] for result in results], axis=0, ddof=1).tolist()
    found["variance"] = float(np.mean([result["variance"] for result in results]))
    for name in ("seconds", "cpu_seconds", "electron_samples"):
        found[name] = sum(result[name] for result in results)
    return found


def _coupled_cluster(molecule: Molecule, small: bool) -> dict[str, Any]:
    reference = reference_density(molecule, "ccsd", "cc-pvdz" if small else "aug-cc-pvtz")
    compared = DensityProperties(GaussianDensity.from_reference(molecule, reference))
    return {
        "energy_ccsd": reference.energy,
        "dipole_ccsd": compared.dipole().value.tolist(),
        "second_moment_ccsd": float(compared.second_moment().value),
        "hirshfeld_ccsd": compared.hirshfeld_charges().value.tolist(),
    }


def dissociation(small: bool) -> dict[str, Any]:
    """Return energies and dipoles of LiH at five bond lengths, next to CCSD(T) and CCSD."""
    pyscf = require_pyscf()
    points = []
    for length in CURVE[:2] if small else CURVE:
        molecule = Molecule.build([3, 1], [[0, 0, 0], [0, 0, length]])
        _, found = run_of(f"LiH-{length}", molecule, settings_for(small, active_space=(2, 5)))
        method = mean_field(molecule, "cc-pvdz" if small else "aug-cc-pvtz")
        solver = pyscf.cc.CCSD(method)
        solver.kernel()
        points.append(
            {
                "length": length,
                "energy": found["energy"],
                "dipole": [found["dipole"][0][2], found["dipole"][1][2]],
                "seconds": found["seconds"],
                "energy_ccsd_t": float(solver.e_tot + solver.ccsd_t()),
                "dipole_ccsd": _coupled_cluster(molecule, small)["dipole_ccsd"][2],
            }
        )
    if not small:
        draw_dissociation(points, FIGURE)
    return {"points": points, "seconds": sum(point["seconds"] for point in points)}


def coverage(name: str, small: bool) -> dict[str, Any]:
    """Return how often intervals of one standard error hold the exact value, for samples of a determinant."""
    seeds = 4 if small else 40
    settings = settings_for(small, orbitals="hartree-fock", jastrow=False)
    settings = replace(settings, sampling=SamplingSettings(walkers=256, equilibration=150, sweeps=12, interval=5))
    hits: dict[str, list[bool]] = {}
    deviations: dict[str, list[float]] = {}  # in standard errors
    begin = time.monotonic()
    molecule = {"H2": H2, "LiH": LIH}[name]
    made = DensityRun(molecule, settings)
    exact = base_density(made.wave_function, made.grid)
    truth = DensityProperties(exact, made.grid)
    nuclear = truth.nuclear_attraction().value
    base = _shrunken(exact)
    for seed in range(seeds):
        run = DensityRun(molecule, replace(settings, seed=seed + 1), wave_function=made.wave_function)
        found = DensityProperties(fit_linear_log_density(run.samples, base, made.grid, settings.fit), made.grid)
        samples = run.samples
        attraction = -(
            molecule.charges / torch.linalg.vector_norm(samples.positions[:, :, :, None] - molecule.centers, dim=4)
        ).sum((2, 3))
        raw = samples.average(attraction)
        pairs = {
            "nuclear attraction, plain average": (raw.value - nuclear, raw.error),
            "dipole": (found.dipole().value[2] - truth.dipole().value[2], found.dipole().error[2]),
            "<r^2>": _gap(found.second_moment(), truth.second_moment()),
            "quadrupole": (
                found.quadrupole().value[2, 2] - truth.quadrupole().value[2, 2],
                found.quadrupole().error[2, 2],
            ),
            "Hirshfeld charge": (
                found.hirshfeld_charges().value[0] - truth.hirshfeld_charges().value[0],
                found.hirshfeld_charges().error[0],
            ),
        }
        contact, forces = found.contact_densities(), found.forces()
        exact_contact, exact_forces = truth.contact_densities().value, truth.forces().value
        for atom in range(0 if name == "LiH" else 1, 2):
            element = ("lithium", "hydrogen")[atom]
            pairs[f"contact density of {element}"] = (
                contact.value[atom] - exact_contact[atom], contact.error[atom]
            )  # fmt: skip
            pairs[f"force on {element}"] = (
                forces.value[atom, 2] - exact_forces[atom, 2], forces.error[atom, 2]
            )  # fmt: skip
        for label, (gap, error) in pairs.items():
            if error > 1e-9:  # what is zero by symmetry has no error to test
                hits.setdefault(label, []).append(bool(abs(gap) <= error))
                deviations.setdefault(label, []).append(float(gap / error))
    every = [hit for row in hits.values() for hit in row]
    return {
        "coverage": {label: float(np.mean(row)) for label, row in hits.items()},
        "mean_deviation": {label: float(np.mean(row)) for label, row in deviations.items()},
        "overall": float(np.mean(every)),
        "seeds": seeds,
        "seconds": time.monotonic() - begin,
    }


def _gap(found: Any, truth: Any) -> tuple[float, float]:
    return float(found.value - truth.value), float(found.error)


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "H": lambda small: atom("H", small),
    "He": lambda small: atom("He", small),
    "H2": hydrogen_molecule,
    "H2-determinant": lambda small: mean_field_determinant("H2-determinant", small),
    "LiH-determinant": lambda small: mean_field_determinant("LiH-determinant", small),
    "LiH": lithium_hydride,
    "coverage-H2": lambda small: coverage("H2", small),
    "coverage-LiH": lambda small: coverage("LiH", small),
    "Li": lambda small: atom("Li", small),
    "N": lambda small: atom("N", small),
    "O": lambda small: atom("O", small),
    "H2O": lambda small: polar("H2O", small),
    "HF": lambda small: polar("HF", small),
    "CO": lambda small: polar("CO", small),
    "NH3": lambda small: polar("NH3", small),
    "HF-casscf": lambda small: polar("HF", small, (8, 5)),
    "H2O-casscf": lambda small: polar("H2O", small, (8, 6)),
    "H2O-casscf-8-8": lambda small: polar("H2O", small, (8, 8)),
    "CO-casscf": lambda small: polar("CO", small, (10, 8)),
    "NH3-casscf": lambda small: polar("NH3", small, (8, 7)),
    "dissociation": dissociation,
}


def stored() -> dict[str, Any]:
    """Return what was measured so far."""
    return json.loads(FILE.read_text())["cases"] if FILE.is_file() else {}


def store(name: str, result: dict[str, Any]) -> None:
    """Add one case to the file of results."""
    cases = stored() | {name: result}
    RESULTS.mkdir(exist_ok=True)
    part = FILE.with_suffix(".part")
    ordered = {case: cases[case] for case in CASES if case in cases}
    part.write_text(json.dumps({"machine": machine(), "cases": ordered}, indent=1) + "\n")
    part.replace(FILE)


def print_table(cases: dict[str, Any]) -> None:
    """Print one line a case."""
    table = Table("case", "energy", "dipole z", "contact", "force z", "seconds", box=None)
    for name, case in cases.items():
        if "energy" not in case:
            table.add_row(name, *[str(case.get("overall", "")), "", "", "", f"{case['seconds']:.0f}"])
            continue
        table.add_row(
            name,
            f"{case['energy'][0]:.4f}({case['energy'][1]:.4f})",
            f"{case['dipole'][0][2]:.4f}({case['dipole'][1][2]:.4f})",
            " ".join(f"{v:.4f}({e:.4f})" for v, e in zip(*case["contact"], strict=True)),
            " ".join(f"{v[2]:.4f}({e[2]:.4f})" for v, e in zip(*case["forces"], strict=True)),
            f"{case['seconds']:.0f}",
        )
    Console(width=200).print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; results are printed only")
    parser.add_argument("--recompute", action="store_true", help="repeat finished cases too")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    done = {} if options.small or options.recompute else stored()
    for name in [] if options.table else options.cases or list(CASES):
        if name in done:
            continue
        result = CASES[name](options.small)
        done[name] = result
        if not options.small:
            store(name, result)
        print_table({name: result})
    if options.table:
        print_table(done)


if __name__ == "__main__":
    main()
