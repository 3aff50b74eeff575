"""Potentials as TorchForce: the real one under ``make test-torchforce``, and what can be checked without it everywhere."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm_contexts import context_of, evaluate
from packaging.version import Version

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError, MissingDependencyError
from flowbridge.core.evaluator import Evaluator
from flowbridge.core.model_files.files import save
from flowbridge.core.potential import Potential, PotentialMetadata
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.integrations.openmm import add_potential, particle_system
from flowbridge.integrations.openmm.forces.torchforce import _Evaluation, traced

# Where the make target puts a second OpenMM, with its own copy of openmmtorch.
OLDER_OPENMM = Path(sys.prefix) / "openmm-8.5"
# Adds a model, serialises, removes the model's file, reads back; prints both energies and the largest difference of forces.
ROUND_TRIP = """
import os, sys
import numpy as np, openmm, torch
from flowbridge.integrations.openmm import add_potential, particle_system

def evaluate(system):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value

positions = np.load(sys.argv[2])
system = particle_system(sys.argv[1])
add_potential(system, sys.argv[1], backend="torchforce")
before = evaluate(system)
text = openmm.XmlSerializer.serialize(system)
os.remove(sys.argv[1])
after = evaluate(openmm.XmlSerializer.deserialize(text))
print(openmm.__version__, before[0], after[0], np.abs(before[1] - after[1]).max())
"""
UNREADABLE = "ignore:openmmtorch 1.5 crashes"
pytestmark = pytest.mark.filterwarnings(UNREADABLE)
unsaved = pytest.mark.filterwarnings("ignore:this potential is in no model file")
PLATFORMS = [
    openmm.Platform.getPlatform(i).getName()
    for i in range(openmm.Platform.getNumPlatforms())
    if openmm.Platform.getPlatform(i).getName() in ("Reference", "CPU", "CUDA", "OpenCL")
]


def real() -> bool:
    """Whether TorchForce loads here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openmmtorch  # noqa: F401
    except Exception:
        return False
    return torch.__version__.startswith("2.9.")


def openmm_before(*version: int) -> bool:
    return Version(openmm.__version__) < Version(".".join(map(str, version)))


torchforce = pytest.mark.skipif(not real(), reason="needs openmmtorch with its torch: make test-torchforce")


@pytest.fixture(scope="module")
def flow(alanine) -> BoltzmannGenerator:
    design = {
        "circular": "soft",
        "torsions": {"couplings": 1, "components": 3, "hidden": [4], "learn_steepness": True},
        "stiff": {"couplings": 1, "hidden": [4]},
    }
    model = BoltzmannGenerator.untrained(
        alanine.particles, 300.0, alanine.shaken(600), FlowConfiguration.model_validate(design)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).double()


class TestScript:
    """TorchScript against the potential, at configurations where it was not recorded."""

    @pytest.mark.parametrize("energy_only", [False, True], ids=["energy and forces", "energy"])
    @pytest.mark.parametrize("name", ["flow", "morse"])
    def test_values(self, request, alanine, name, energy_only):
        potential = request.getfixturevalue(name)
        particles = [index + 3 for index in reversed(range(22))]
        parameters = dict(potential.metadata.global_parameters)
        script = traced(_Evaluation(Evaluator(potential), particles, 30, energy_only=energy_only))
        for seed, factor in ((5, 1.0), (6, 0.7)):
            molecule = torch.as_tensor(alanine.shaken(1, seed=seed)[0])
            positions = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            positions[particles] = molecule
            values = dict.fromkeys(parameters, factor)
            inputs = [positions, *(torch.tensor(value, dtype=torch.float64) for value in values.values())]
            expected = potential.energy_and_forces(molecule[None], **values)
            if energy_only:
                positions.requires_grad_(True)
                energy = script(*inputs)
                (slope,) = torch.autograd.grad(energy, positions)
                forces = -slope
            else:
                energy, forces = script(*inputs)
            assert float(energy.detach()) == pytest.approx(float(expected.energy), rel=1e-10)
            scale = float(expected.forces.abs().max())
            assert torch.allclose(forces[particles], expected.forces[0], atol=1e-10 * scale)
            others = [index for index in range(30) if index not in particles]
            assert not forces[others].any()

    def test_an_evaluation_that_depends_on_data(self, alanine):
        class Deciding(Potential):
            def __init__(self):
                super().__init__()
                self.metadata = PotentialMetadata(alanine.particles)

            def forward(self, positions, cell=None):
                energy = positions.square().sum((1, 2))
                return energy if float(energy.sum()) > 1e3 else 2.0 * energy

        module = _Evaluation(Evaluator(Deciding()), range(22), 22, energy_only=False)
        with pytest.raises(ConfigurationError, match=r"cannot be traced to TorchScript.*backend=.python."):
            traced(module)


class TestForce:
    @torchforce
    def test_it_is_the_real_one(self, morse_file, capsys):
        import openmmtorch

        system = particle_system(morse_file)
        force = add_potential(system, morse_file, backend="torchforce")
        assert type(force) is openmmtorch.TorchForce
        assert force.getOutputsForces()
        with capsys.disabled():
            print(f"\nopenmmtorch.TorchForce in use: {openmmtorch.__file__}, torch {torch.__version__}")

    @torchforce
    @unsaved
    @pytest.mark.parametrize("platform", PLATFORMS)
    @pytest.mark.parametrize("backend", ["python", "torchforce"])
    @pytest.mark.parametrize("name", ["flow", "morse"])
    def test_backends_platforms_and_ase_agree(self, request, alanine, name, backend, platform):
        """To 1e-8 of the largest force in double precision; OpenMM's CPU platform keeps positions in single: 1e-3."""
        potential = request.getfixturevalue(name)
        positions = alanine.shaken(1, seed=8)[0]
        system = particle_system(potential)
        add_potential(system, potential, backend=backend)
        energy, forces = evaluate(context_of(system, platform), positions)
        import ase
        from ase import units

        atoms = ase.Atoms(numbers=alanine.particles.atomic_numbers, positions=positions * units.nm)
        atoms.calc = PotentialCalculator(potential)
        largest = np.abs(forces).max()
        double = platform == "Reference"
        unit_of_energy = units.kJ / units.mol
        assert energy == pytest.approx(atoms.get_potential_energy() / unit_of_energy, rel=1e-9 if double else 1e-4)
        through_ase = atoms.get_forces() / unit_of_energy * units.nm
        assert np.abs(forces - through_ase).max() <= (1e-8 if double else 1e-3) * largest

    @torchforce
    def test_subset_group_scale_and_replicas(self, morse, morse_file, alanine):
        system = openmm.System()
        for mass in (39.9, *alanine.particles.masses, *alanine.particles.masses):
            system.addParticle(mass)
        add_potential(
            system, morse_file, particles=range(1, 45), replicas=2, scale_parameter="flow_scale", force_group=3,
            backend="torchforce",
        )  # fmt: skip
        positions = alanine.shaken(2, seed=9)
        context = context_of(system)
        context.setParameter("flow_scale", 0.5)
        context.setParameter("stiffness", 1.5)
        every = np.concatenate([[[1.0, 2.0, 3.0]], positions.reshape(-1, 3)])
        energy, forces = evaluate(context, every, groups={3})
        expected = morse.energy_and_forces(torch.as_tensor(positions), stiffness=1.5)
        assert energy == pytest.approx(0.5 * float(expected.energy.sum()), rel=1e-10)
        assert np.allclose(forces[1:], 0.5 * expected.forces.reshape(-1, 3), rtol=1e-8, atol=1e-8)
        assert not forces[0].any()
        assert evaluate(context, every, groups={0})[0] == 0.0

    @torchforce
    def test_derivatives_by_parameters(self, morse_file, alanine):
        system = particle_system(morse_file)
        force = add_potential(system, morse_file, parameter_derivatives=["stiffness"])
        assert not force.getOutputsForces()
        context = context_of(system)
        positions = alanine.shaken(1, seed=10)[0]
        plain = particle_system(morse_file)
        add_potential(plain, morse_file, backend="python")
        assert np.allclose(
            evaluate(context, positions)[1], evaluate(context_of(plain), positions)[1], rtol=1e-8, atol=1e-7
        )
        found = context.getState(parameterDerivatives=True).getEnergyParameterDerivatives()["stiffness"]
        step, energies = 1e-4, []
        for sign in (1.0, -1.0):
            context.setParameter("stiffness", 1.0 + sign * step)
            energies.append(evaluate(context, positions)[0])
        assert found == pytest.approx((energies[0] - energies[1]) / (2 * step), rel=1e-6)

    @torchforce
    @pytest.mark.skipif(not OLDER_OPENMM.is_dir(), reason="needs OpenMM 8.5 beside: make test-torchforce")
    def test_the_xml_holds_the_model(self, flow, alanine, tmp_path):
        """In a process of its own, with OpenMM 8.5: openmmtorch 1.5 crashes where 8.6 reads its XML."""
        save(flow, tmp_path / "alanine.flow")
        np.save(tmp_path / "positions.npy", alanine.shaken(1, seed=11)[0])
        environment = os.environ | {"PYTHONPATH": str(OLDER_OPENMM)}
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ROUND_TRIP, tmp_path / "alanine.flow", tmp_path / "positions.npy"],
            env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        version, before, after, difference = run.stdout.split()
        assert version.startswith("8.5.")
        assert (before, float(difference)) == (after, 0.0)

    @torchforce
    @pytest.mark.skipif(openmm_before(8, 6), reason="older versions of OpenMM read the XML")
    def test_it_warns_of_xml_that_cannot_be_read(self, morse_file):
        with pytest.warns(UserWarning, match=r"openmmtorch 1\.5 crashes .* OpenMM 8\.5"):
            add_potential(particle_system(morse_file), morse_file, backend="torchforce")

    @torchforce
    @unsaved
    def test_a_periodic_box(self, fluid):
        system = particle_system(fluid)
        system.setDefaultPeriodicBoxVectors(*(1.5 * np.eye(3)))
        add_potential(system, fluid, backend="torchforce")
        context = context_of(system)
        random = np.random.default_rng(1)
        positions = random.uniform(0, 1.5, (len(fluid.metadata.particles), 3))
        shifted = positions + 1.5 * random.integers(-2, 3, positions.shape)
        energies = [evaluate(context, x)[0] for x in (positions, shifted)]
        cell = torch.as_tensor(1.5 * np.eye(3))[None]
        assert energies[0] == pytest.approx(fluid(torch.as_tensor(positions)[None], cell).item(), rel=1e-10)
        assert energies[1] == pytest.approx(energies[0], rel=1e-8)

    @torchforce
    def test_dynamics_keeps_the_energy(self, morse_file, alanine):
        system = particle_system(morse_file)
        add_potential(system, morse_file, backend="torchforce")
        context = context_of(system, step=0.0005)
        context.setPositions(alanine.positions)
        context.setVelocitiesToTemperature(300.0, 1)
        total = []
        for _ in range(50):
            context.getIntegrator().step(4)
            state = context.getState(energy=True)
            total.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
        assert np.std(total) < 0.5

    def test_unknown_derivative_and_device(self, morse_file):
        system = particle_system(morse_file)
        with pytest.raises(ConfigurationError, match="leave device out"):
            add_potential(system, morse_file, backend="torchforce", device="cpu")
        with pytest.raises((ConfigurationError, MissingDependencyError)):
            add_potential(system, morse_file, parameter_derivatives=["nothing"])

    def test_without_the_package(self, morse_file, monkeypatch):
        monkeypatch.setitem(sys.modules, "openmmtorch", None)
        system = particle_system(morse_file)
        with pytest.raises(
            MissingDependencyError, match=r"needs openmmtorch, which does not load here.*pip install torch=="
        ):
            add_potential(system, morse_file, backend="torchforce")
        assert system.getNumForces() == 0
