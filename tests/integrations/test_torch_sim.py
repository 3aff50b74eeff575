"""Models in torch-sim: its own comparison with ASE, its integrator, its batches."""

import ase
import numpy as np
import pytest
import torch
from ase import units

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError

torch_sim = pytest.importorskip(
    "torch_sim", reason="torch-sim is not installed: pip install torch-sim-atomistic (Python 3.12)"
)
from torch_sim.testing import assert_model_calculator_consistency  # noqa: E402

from flowbridge.integrations.torch_sim import FlowbridgeTorchSimModel  # noqa: E402


def atoms_of(molecule, positions, **keywords):
    return ase.Atoms(molecule.particles.atomic_numbers, positions * units.nm, **keywords)


def state_of(*atoms):
    return torch_sim.initialize_state(list(atoms), device=torch.device("cpu"), dtype=torch.float64)


def test_its_own_comparison_with_the_calculator(morse_file, alanine):
    model, calculator = FlowbridgeTorchSimModel(morse_file), PotentialCalculator(morse_file)
    for positions in alanine.shaken(3):
        state = state_of(atoms_of(alanine, positions))
        assert_model_calculator_consistency(
            model, calculator, state, energy_rtol=1e-10, energy_atol=1e-10, force_rtol=1e-9, force_atol=1e-9
        )


def test_its_own_comparison_with_stress(fluid):
    random = np.random.default_rng(1)
    cell = 15.0 * np.eye(3) + random.normal(0.0, 0.8, (3, 3))
    positions = random.uniform(0.0, 1.0, (12, 3)) @ cell
    atoms = ase.Atoms("Ar12", positions=positions, cell=cell, pbc=True)
    model = FlowbridgeTorchSimModel(fluid)
    assert model.compute_stress
    tight = {f"{name}_{kind}": 1e-9 for name in ("energy", "force", "stress") for kind in ("rtol", "atol")}
    assert_model_calculator_consistency(model, PotentialCalculator(fluid), state_of(atoms), **tight)
    moved = atoms.copy()
    moved.positions += random.integers(-2, 3, (12, 3)) @ cell
    assert float(model(state_of(moved))["energy"]) == pytest.approx(float(model(state_of(atoms))["energy"]), rel=1e-9)


def test_a_batch_is_its_systems(morse, alanine):
    frames = [atoms_of(alanine, positions) for positions in alanine.shaken(5)]
    model = FlowbridgeTorchSimModel(morse, global_parameters={"stiffness": 1.3})
    together = model(state_of(*frames))
    for index, atoms in enumerate(frames):
        alone = model(state_of(atoms))
        assert float(together["energy"][index]) == pytest.approx(float(alone["energy"]), rel=1e-12)
        assert torch.allclose(together["forces"].reshape(5, 22, 3)[index], alone["forces"], atol=1e-10)
    assert not together["energy"].requires_grad
    assert not together["forces"].requires_grad


def test_dynamics_at_constant_energy(morse, alanine):
    atoms = [atoms_of(alanine, positions) for positions in alanine.shaken(2, amplitude=0.001)]
    model = FlowbridgeTorchSimModel(morse)
    totals = []
    for step in (0.5, 0.25):
        kinetic = []
        state = torch_sim.integrate(
            state_of(*atoms), model, integrator=torch_sim.Integrator.nve, n_steps=round(50 / step), temperature=300.0,
            timestep=step * 1e-3, init_kwargs={"seed": 1},
        )  # fmt: skip
        kinetic = 0.5 * (state.momenta.square() / state.masses[:, None]).reshape(2, -1).sum(1)
        totals.append(kinetic + state.energy)
    # Both end with the energy they started with: halving the step changes it by the integrator's error only.
    assert torch.allclose(totals[0], totals[1], atol=0.02)


def test_refused(morse, fluid, alanine):
    model = FlowbridgeTorchSimModel(morse)
    with pytest.raises(MoleculeMismatchError, match=r"have \[21\] atoms, the potential 22"):
        model(state_of(atoms_of(alanine, alanine.positions)[:21]))
    swapped = atoms_of(alanine, alanine.positions)
    swapped.numbers[[0, 1]] = swapped.numbers[[1, 0]]
    with pytest.raises(
        MoleculeMismatchError, match=r"atom 0 is H where the potential has C, .*another order of its atoms"
    ):
        model(state_of(swapped))
    with pytest.raises(ConfigurationError, match="isolated molecule"):
        model(state_of(atoms_of(alanine, alanine.positions, cell=np.eye(3) * 30.0, pbc=True)))
    with pytest.raises(ConfigurationError, match="periodic in all directions"):
        FlowbridgeTorchSimModel(fluid)(
            state_of(ase.Atoms("Ar12", positions=np.random.default_rng(1).random((12, 3)) * 9))
        )
    with pytest.raises(ConfigurationError, match="no global parameter 'x'"):
        FlowbridgeTorchSimModel(morse, global_parameters={"x": 1.0})
