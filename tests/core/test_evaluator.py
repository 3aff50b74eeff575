"""What stands between an engine and a potential: loading, placing, parameters, checks, stress, and whose particles they are."""

import pickletools
import re

import numpy as np
import openmm
import pytest
import torch

from flowbridge.calculators import PotentialCalculator
from flowbridge.core.errors import ConfigurationError, ModelFileError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.evaluator import EvaluationOptions, Evaluator
from flowbridge.core.matching import check_particles
from flowbridge.core.model_files import files
from flowbridge.core.model_files.files import read_header
from flowbridge.core.potential import EnergyAndForces, Particles, Potential, PotentialMetadata
from flowbridge.integrations.openmm import add_potential, particle_system


@pytest.fixture
def reads(monkeypatch):
    """The model files that were read and verified, and those whose models were built."""
    counted = {"_read": 0, "_build": 0}
    for name in counted:
        original = getattr(files, name)

        def count(*arguments, name=name, original=original):
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(files, name, count)
    return counted


class TestLoading:
    def test_every_engine_reads_a_file_once(self, morse_file, reads):
        system = particle_system(morse_file)
        assert reads == {"_read": 1, "_build": 0}  # its header
        add_potential(system, morse_file)
        assert reads == {"_read": 2, "_build": 1}
        calculator = PotentialCalculator(morse_file)
        assert reads == {"_read": 3, "_build": 1}  # read to see whether it is still the same, built no more
        assert calculator.potential is Evaluator.of(morse_file).potential

    def test_a_model_is_shared_while_somebody_evaluates_it_in_the_same_way(self, morse_file, reads):
        first = Evaluator.of(morse_file)
        assert Evaluator.of(morse_file, EvaluationOptions(scale_parameter="scale")).potential is first.potential
        assert Evaluator.of(morse_file, EvaluationOptions(dtype="float32")).potential is not first.potential
        assert Evaluator.of(morse_file, EvaluationOptions(replicas=2)).potential is not first.potential
        del first
        before = reads["_build"]
        Evaluator.of(morse_file)
        assert reads["_build"] == before + 1

    def test_another_file_is_refused(self, morse_file):
        with pytest.raises(ModelFileError, match="expected 0000"):
            Evaluator.of(morse_file, digest="0" * 64)

    def test_an_object_is_used_as_it_is_unless_it_has_to_be_converted(self, morse):
        assert Evaluator.of(morse).potential is morse
        converted = Evaluator.of(morse, EvaluationOptions(dtype=torch.float32))
        assert converted.options.dtype == "float32"
        assert converted.potential.bond_lengths.dtype == torch.float32
        assert morse.bond_lengths.dtype == torch.float64

    def test_serialised_systems_name_what_they_always_named(self, morse_file):
        """Systems written by every version are read by every other: the names in their pickles are part of the format."""
        system = particle_system(morse_file)
        force = add_potential(system, morse_file, scale_parameter="s", compilation="never")
        stored = bytes.fromhex(re.search('function="([0-9a-f]+)"', openmm.XmlSerializer.serialize(force))[1])
        texts = [argument for _, argument, _ in pickletools.genops(stored) if isinstance(argument, str)]
        options = '{"compilation": "never", "device": null, "dtype": null, "replicas": 1, "scale_parameter": "s"}'
        digest = read_header(morse_file).digest
        assert texts == [
            "flowbridge.integrations.openmm.computation",
            "load_computation",
            str(morse_file),
            digest,
            options,
        ]


class TestEvaluation:
    @pytest.mark.parametrize("dtype", [None, "float32"])
    def test_replicas_are_a_batch(self, morse, alanine, dtype):
        evaluator = Evaluator.of(morse, EvaluationOptions(3, dtype=dtype))
        positions = alanine.shaken(3)
        evaluator.buffers.positions[:] = positions.reshape(-1, 3)
        energy, forces = evaluator.evaluate(parameters=evaluator.parameters({"stiffness": 2.0}))
        expected = morse.energy_and_forces(torch.as_tensor(positions), stiffness=2.0)
        tolerance = 1e-12 if dtype is None else 1e-3
        assert energy == pytest.approx(float(expected.energy.sum()), rel=tolerance)
        assert forces.dtype == np.float64
        scale = float(expected.forces.abs().max())
        assert np.abs(forces.reshape(3, 22, 3) - expected.forces.numpy()).max() < tolerance * scale

    def test_stress_is_the_slope_of_the_energy_with_the_strain(self, fluid):
        random = np.random.default_rng(4)
        cells = torch.as_tensor(1.5 * np.eye(3) + random.normal(0.0, 0.08, (2, 3, 3)))
        positions = torch.as_tensor(random.random((2, 12, 3))) @ cells
        found = Evaluator(fluid).stresses(positions, cells, {})
        for i, j in np.ndindex(3, 3):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[i, j] += 0.5e-5
            strain[j, i] += 0.5e-5
            ends = [fluid(positions + s * positions @ strain, cells + s * cells @ strain).detach() for s in (1.0, -1.0)]
            slope = (ends[0] - ends[1]) / 2e-5 / torch.linalg.det(cells).abs()
            assert torch.allclose(found[:, i, j], slope, rtol=1e-6, atol=1e-8)

    def test_parameters(self, morse):
        evaluator = Evaluator.of(morse, EvaluationOptions(scale_parameter="scale"))
        assert evaluator.global_parameters == {"stiffness": 1.0, "scale": 1.0}
        assert evaluator.parameters({}) == {"stiffness": 1.0}
        with pytest.raises(ConfigurationError, match="no global parameter 'scale'; it has stiffness"):
            evaluator.parameters({"scale": 2.0})
        with pytest.raises(ConfigurationError, match="stiffness must be a finite number, got inf"):
            evaluator.parameters({"stiffness": float("inf")})


class Torn(Potential):
    """Has no energy, and forces that grow along the molecule."""

    def __init__(self, particles, energy=float("nan")):
        super().__init__()
        self.metadata, self.energy = PotentialMetadata(particles), energy

    def energy_and_forces(self, positions, cell=None):
        forces = torch.arange(positions.numel(), dtype=torch.float64).reshape(positions.shape)
        return EnergyAndForces(torch.full((len(positions),), self.energy, dtype=torch.float64), forces)


class Explaining(Torn):
    """Knows what is wrong with a configuration."""

    def describe_strain(self, positions):
        return f"the bond at {positions[0, 0]:.1f} nm is torn"


class TestRefusals:
    def test_the_strain_is_described(self, alanine):
        evaluator = Evaluator(Torn(alanine.particles))
        with pytest.raises(
            NonFiniteEnergyError, match=r"energy of nan kJ/mol .*; the largest force, 111 .* is on .*\(atom 21"
        ):
            evaluator.evaluate()

    def test_by_a_potential_that_knows_its_terms_in_the_replica_concerned(self, alanine):
        evaluator = Evaluator(Explaining(alanine.particles), EvaluationOptions(replicas=2))
        evaluator.buffers.positions[22] = 7.0
        with pytest.raises(NonFiniteEnergyError, match=r"; the bond at 7\.0 nm is torn$"):
            evaluator.evaluate()

    def test_forces_too_large_for_the_engine(self, alanine):
        class Weak(Evaluator):
            largest_force = 50.0

        sound = Torn(alanine.particles, energy=0.0)
        assert Evaluator(sound).evaluate()[0] == 0.0
        with pytest.raises(
            NonFiniteEnergyError, match=r"forces on 6 of 22 particles, first .* exceed 5\.0e\+01 kJ/mol/nm"
        ):
            Weak(sound).evaluate()


def particles_of(numbers, bonds=(), names=None, masses=None):
    count = len(numbers)
    return Particles(names or ("A",) * count, tuple(numbers), masses or (1.0,) * count, bonds)


class TestMatching:
    water = particles_of((8, 1, 1), ((0, 1), (0, 2)), masses=(16.0, 1.0, 1.0))

    def test_copies_one_after_the_other(self):
        check_particles(particles_of((8, 1, 1) * 3), self.water, replicas=3)
        with pytest.raises(MoleculeMismatchError, match="was made for 9 atoms, the Atoms have 8"):
            check_particles(particles_of((8, 1) * 4), self.water, replicas=3)
        with pytest.raises(MoleculeMismatchError, match=r"atom 40 is H where the potential has O, .*2 of 6 differ"):
            check_particles(particles_of((8, 1, 1, 1, 8, 1)), self.water, replicas=2, indices=range(37, 43))

    def test_bonds_across_copies_or_unknown_ones(self):
        check_particles(particles_of((8, 1, 1) * 2, ((0, 1), (3, 5))), self.water, replicas=2)
        for bond in ((1, 2), (0, 4)):
            with pytest.raises(MoleculeMismatchError, match="the order of the atoms differs"):
                check_particles(particles_of((8, 1, 1) * 2, (bond,)), self.water, replicas=2)

    def test_masses_may_be_shifted_to_hydrogens_within_a_copy(self):
        shifted = particles_of((0,) * 6, masses=(12.0, 3.0, 3.0, 16.0, 1.0, 1.0))
        check_particles(shifted, self.water, "masses", replicas=2)
        with pytest.raises(MoleculeMismatchError, match=r"particle 3 .*weighs 20\.000 amu"):
            check_particles(
                particles_of((0,) * 6, masses=(16.0, 1.0, 1.0, 18.0, 1.0, 1.0)), self.water, "masses", replicas=2
            )

    def test_beads_are_known_by_their_names(self):
        beads = particles_of((0, 0), names=("CA", "CB"))
        check_particles(particles_of((20, 0), names=("CA", "CB")), beads)
        with pytest.raises(MoleculeMismatchError, match="is Ca where the potential has no element"):
            check_particles(particles_of((20, 0), names=("C", "CB")), beads)
