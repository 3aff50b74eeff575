"""Quantum Monte Carlo as an ASE calculator, with an error bar on every number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    InputError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.units import Bohr, Hartree
from numpy.typing import NDArray

from ...core.errors import ConfigurationError
from ...core.statistics.bootstrap import Estimate
from .density.convex_fit import DensityFitSettings
from .density.cubes import density_on_cell, write_density_cube
from .density.densities import DensityModel, SumDensity
from .density_run import Announce, DensityRun, RunSettings, run_from_files
from .electronic_structure import DEFAULT_BASIS, require_pyscf
from .molecule import Molecule
from .properties.properties import DensityProperties
from .wave_function.linear_method import OptimisationSettings
from .wave_function.sampling import ElectronSamples, SamplingSettings
from .wave_function.trial_functions import TrialSettings
from .wave_function.wave_function import SlaterJastrow

Array = NDArray[np.float64]
HELLMANN_FEYNMAN = "hellmann-feynman"

_CHARGES = ("hirshfeld", "becke")


class QMCCalculator(Calculator):
    """Energies, densities and their properties, from an optimised and sampled Slater-Jastrow wave function.

    Standard properties, in ASE's units, are ``energy`` and ``free_energy`` (the same), ``dipole``, ``charges``, ``magmom``,
    and ``forces`` if requested by ``forces="hellmann-feynman"``. Their standard errors are in :attr:`errors`
    under the same names. Everything else is a method, or an attribute of :attr:`properties` in atomic units.

    The forces are those of the density on the nuclei (Hellmann and Feynman). They lack the Pulay term, which vanishes only for
    an exact wave function, and are noisy: accurate to some 0.02 Hartree/bohr (1 eV/Angstrom) on atoms with a core, and an order
    of magnitude better on hydrogen. :meth:`get_net_force` measures their error. Do not use them for relaxation or dynamics.

    The calculator treats isolated molecules of hydrogen to neon. The same seed gives the same results. A ``directory`` stores
    all results for later use; a run that was stopped continues.

    Args:
        charge: total charge in e; None for the sum of the Atoms' initial charges.
        spin: number of unpaired electrons; None for the sum of the Atoms' initial magnetic moments, or where these are
            zero the lowest number that is possible.
        orbitals: ``"natural"`` (of CCSD) or ``"hartree-fock"``.
        basis: Gaussian basis of PySCF for the orbitals.
        active_space: numbers of electrons and orbitals of a CASSCF expansion; None for a single determinant.
        virtual: number of virtual orbitals that the optimiser may mix into the occupied ones.
        jastrow: False for a mean-field determinant.
        model: model of the density: ``"linear"``, ``"neural"``, ``"determinant"``.
        walkers, sweeps, interval, equilibration: settings of the sampler, see
            :class:`~flowbridge.calculators.qmc.wave_function.sampling.SamplingSettings`.
        iterations, optimisation_sweeps: settings of the optimiser, see
            :class:`~flowbridge.calculators.qmc.wave_function.linear_method.OptimisationSettings`.
        likelihood: weight of the likelihood in the fit, see
            :class:`~flowbridge.calculators.qmc.density.convex_fit.DensityFitSettings`.
        response: False omits the noise of the optimised parameters from the errors, see
            :mod:`~flowbridge.calculators.qmc.density.parameter_response`.
        partition: partition for ``charges``, ``"hirshfeld"`` or ``"becke"``.
        forces: ``"hellmann-feynman"`` for forces, or None.
        wave_function: file of a wave function to sample.
        samples: file of samples of another program.
        seed: random seed.
        directory: folder of the results; None for memory only.
        announce: function that receives the progress.

    Raises:
        CalculatorSetupError: for unknown parameters or parameters that do not fit together.
        MissingDependencyError: without PySCF.
    """

    implemented_properties = ["energy", "free_energy", "dipole", "charges", "magmom", "forces"]
    default_parameters = {
        "charge": None,
        "spin": None,
        "orbitals": "natural",
        "basis": DEFAULT_BASIS,
        "active_space": None,
        "virtual": 0,
        "jastrow": True,
        "model": "linear",
        "walkers": 1024,
        "sweeps": 60,
        "interval": 8,
        "equilibration": 300,
        "iterations": 4,
        "optimisation_sweeps": 10,
        "likelihood": 0.05,
        "response": True,
        "partition": "hirshfeld",
        "forces": None,
        "wave_function": None,
        "samples": None,
        "seed": 1,
    }
    ignored_changes = {"cell"}  # a box for the density grid, without effect on the molecule

    def __init__(
        self, *, directory: str | os.PathLike[str] | None = None, announce: Announce | None = None, **parameters: Any
    ) -> None:
        require_pyscf()
        self._folder = None if directory is None else Path(directory)
        self._announce = announce
        self._run: DensityRun | None = None
        self.errors: dict[str, Any] = {}
        super().__init__(directory="." if directory is None else str(directory), **parameters)

    def set(self, **parameters: Any) -> dict[str, Any]:
        """Change parameters and discard results that depend on them.

        Raises:
            CalculatorSetupError: for an unknown name or a value that cannot be used.
        """
        unknown = sorted(set(parameters) - set(self.default_parameters))
        if unknown:
            raise CalculatorSetupError(
                f"unknown parameters {', '.join(unknown)}; there are {', '.join(sorted(self.default_parameters))}"
            )
        candidate = {**self.default_parameters, **self.parameters, **parameters}
        try:
            _settings(candidate)
        except (ConfigurationError, TypeError) as error:
            raise CalculatorSetupError(str(error)) from error
        if candidate["forces"] not in (None, HELLMANN_FEYNMAN):
            raise CalculatorSetupError(f"forces must be {HELLMANN_FEYNMAN!r} or None, got {candidate['forces']!r}")
        if candidate["partition"] not in _CHARGES:
            raise CalculatorSetupError(
                f"partition must be one of {', '.join(_CHARGES)}, got {candidate['partition']!r}"
            )
        changed: dict[str, Any] = super().set(**parameters)
        if changed:
            self.reset()
        return changed

    def reset(self) -> None:
        """Discard the last molecule and its results; the folder is unchanged."""
        super().reset()
        self._run = None
        self.errors = {}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute energy, dipole, charges and magnetic moment, and forces if requested.

        Raises:
            InputError: for periodic atoms, or charge and spin that are impossible.
            ConvergenceError: when PySCF, the optimiser or the sampler does not converge; finished results stay in the folder.
        """
        if "forces" in properties and self.parameters["forces"] != HELLMANN_FEYNMAN:
            raise PropertyNotImplementedError(
                f"forces are computed where they are asked for by name, QMCCalculator(forces={HELLMANN_FEYNMAN!r}): they are "
                "noisy, and lack the Pulay term, so that they serve analysis and neither relaxation nor dynamics"
            )
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise InputError("no Atoms were calculated yet: pass atoms, or attach the calculator to them")
        if self._run is None or set(system_changes) - self.ignored_changes:
            self._run = self._new_run(self.atoms)
        run = self._run
        energy = run.samples.energy
        self._record("energy", Estimate(energy.value * Hartree, energy.error * Hartree))
        self._record("free_energy", Estimate(energy.value * Hartree, energy.error * Hartree))
        self._record("magmom", Estimate(float(run.molecule.spin), 0.0))
        found = run.properties
        self._record("dipole", _scaled(found.dipole(), Bohr))
        charges = found.becke_charges() if self.parameters["partition"] == "becke" else found.hirshfeld_charges()
        self._record("charges", charges)
        if "forces" in properties:
            self._record("forces", _scaled(found.forces(), Hartree / Bohr))

    @property
    def run(self) -> DensityRun:
        """The last calculated molecule, with wave function, samples and density.

        Raises:
            InputError: before a calculation.
        """
        if self._run is None:
            raise InputError("nothing was calculated yet: ask atoms with this calculator for their energy first")
        return self._run

    @property
    def properties(self) -> DensityProperties:
        """Properties of the density, in atomic units, each with its error."""
        return self.run.properties

    @property
    def density(self) -> DensityModel:
        """The density, in e/bohr^3 at points in bohr."""
        return self.run.density

    @property
    def wave_function(self) -> SlaterJastrow:
        """The wave function."""
        return self.run.wave_function

    @property
    def samples(self) -> ElectronSamples:
        """The sampled electrons."""
        return self.run.samples

    def get_quadrupole(self) -> Estimate[Array]:
        """Return the traceless quadrupole ``(3, 3)`` in e Angstrom^2 about the centre of the nuclear charges."""
        return _scaled(self.properties.quadrupole(), Bohr**2)

    def get_contact_densities(self) -> Estimate[Array]:
        """Return the density at the nuclei ``(A,)`` in e/Angstrom^3."""
        return _scaled(self.properties.contact_densities(), Bohr**-3)

    def get_spin_contact_densities(self) -> Estimate[Array]:
        """Return the density of spin up less that of spin down at the nuclei ``(A,)`` in e/Angstrom^3.

        Hyperfine couplings are proportional to it. A special estimator
        (:mod:`~flowbridge.calculators.qmc.properties.spin_contact`) replaces the difference of two fitted densities, which is
        mostly noise at nuclei.
        """
        return _scaled(self.run.spin_contact_densities, Bohr**-3)

    def get_net_force(self) -> Estimate[Array]:
        """Return the sum of the Hellmann-Feynman forces ``(3,)`` in eV/Angstrom; zero for an exact density."""
        return _scaled(self.properties.net_force(), Hartree / Bohr)

    def get_electrostatic_potential(self, points: Array) -> Estimate[Array]:
        """Return the electrostatic potential in V at ``points`` ``(Q, 3)`` in Angstrom."""
        return _scaled(self.properties.electrostatic_potential(np.asarray(points) / Bohr), Hartree)

    def get_pseudo_density(self, atoms: Atoms | None = None, spin: int | None = None, spacing: float = 0.2) -> Array:
        """Return the all-electron density on the grid of the cell ``(n1, n2, n3)`` in e/Angstrom^3.

        ASE's tools for densities call this name; there are no pseudopotentials here.

        Args:
            atoms: Atoms with a cell and the calculated molecule; the last calculated Atoms where None.
            spin: 0 for spin up, 1 for spin down (open shells only), None for the total.
            spacing: largest distance of neighbouring points, Angstrom.

        Raises:
            InputError: without a cell, or for missing spin densities.
        """
        chosen = self._with_cell(atoms)
        density = self.density
        if spin is not None:
            if not isinstance(density, SumDensity) or spin not in (0, 1):
                raise InputError(
                    f"spin {spin!r} has no density of its own: spin densities are fitted for open shells, and spin is 0 or 1"
                )
            density = density.down if spin else density.up
        return density_on_cell(density, chosen, spacing) / Bohr**3

    def write_cube(self, path: str | os.PathLike[str], atoms: Atoms | None = None, spacing: float = 0.15) -> None:
        """Write the density as a Gaussian cube file in e/bohr^3, as is the custom.

        Raises as :meth:`get_pseudo_density`.
        """
        write_density_cube(path, self.density, self._with_cell(atoms), spacing)

    def _with_cell(self, atoms: Atoms | None) -> Atoms:
        chosen = self.atoms if atoms is None else atoms
        if chosen is None:
            raise InputError("nothing was calculated yet: ask atoms with this calculator for their energy first")
        if atoms is not None:
            changes = set(self.check_state(atoms)) - self.ignored_changes
            if self._run is None or changes:
                self.calculate(atoms, ["energy"], list(all_changes))
        return chosen

    def _new_run(self, atoms: Atoms) -> DensityRun:
        parameters = self.parameters
        if atoms.pbc.any():
            raise InputError("quantum Monte Carlo here is for isolated molecules: set atoms.pbc = False")
        try:
            molecule = molecule_of(atoms, parameters["charge"], parameters["spin"])
        except ConfigurationError as error:
            raise InputError(str(error)) from error
        return run_from_files(
            molecule,
            _settings(parameters),
            self._folder,
            samples=_path(parameters["samples"]),
            wave_function=_path(parameters["wave_function"]),
            announce=self._announce,
        )

    def _record(self, name: str, estimate: Estimate[Any]) -> None:
        self.results[name], self.errors[name] = estimate.value, estimate.error


def molecule_of(atoms: Atoms, charge: int | None = None, spin: int | None = None) -> Molecule:
    """Return the molecule of ASE's Atoms, with their charge and spin where None.

    Raises:
        ConfigurationError: see :class:`~flowbridge.calculators.qmc.molecule.Molecule`.
    """
    if charge is None:
        total = float(atoms.get_initial_charges().sum())
        charge = round(total)
        if abs(total - charge) > 1e-6:
            raise ConfigurationError(f"the initial charges add up to {total}, no whole number: give charge=...")
    if spin is None:
        moment = abs(float(atoms.get_initial_magnetic_moments().sum()))
        if abs(moment - round(moment)) > 1e-6:
            raise ConfigurationError(f"the initial magnetic moments add up to {moment}, no whole number: give spin=...")
        spin = round(moment) or None
    return Molecule.build(atoms.numbers, atoms.positions / Bohr, charge, spin)


def _settings(parameters: dict[str, Any]) -> RunSettings:
    space = parameters["active_space"]
    return RunSettings(
        trial=TrialSettings(
            parameters["orbitals"],
            parameters["basis"],
            bool(parameters["jastrow"]),
            None if space is None else (int(space[0]), int(space[1])),
            int(parameters["virtual"]),
        ),
        optimisation=OptimisationSettings(
            parameters["iterations"], parameters["optimisation_sweeps"], equilibration=parameters["equilibration"]
        ),
        sampling=SamplingSettings(
            parameters["walkers"], parameters["equilibration"], parameters["sweeps"], parameters["interval"]
        ),
        model=parameters["model"],
        fit=DensityFitSettings(parameters["likelihood"]),
        response=bool(parameters["response"]),
        seed=int(parameters["seed"]),
    )


def _path(given: Any) -> Path | None:
    return None if given is None else Path(given)


def _scaled(estimate: Estimate[Array], factor: float) -> Estimate[Array]:
    return Estimate(estimate.value * factor, estimate.error * factor)
