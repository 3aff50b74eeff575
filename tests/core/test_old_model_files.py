"""Model files of the version before, one of every kind: they load, and give the numbers that that version gave.

``reference.json`` holds, for each file, positions and energies, samples and their weights, or what else the model is for.
"""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.calculator import CalculatorSetupError

import flowbridge as fb
from flowbridge.core.errors import ConfigurationError, ModelFileError
from flowbridge.core.model_files.files import matches_its_file, save
from flowbridge.core.samples import WeightedSamples
from flowbridge.flows.equivariant.systems import DoubleWellParticles, LennardJonesCluster
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.molecule_sets import MoleculeSet
from flowbridge.forcefields.private.learning.feed_forward import FeedForwardNetwork
from flowbridge.forcefields.private.ledger import ledger_of
from flowbridge.integrations.openmm import add_potential, particle_system

FOLDER = Path(__file__).parents[1] / "data" / "models_0_1"
REFERENCE = json.loads((FOLDER / "reference.json").read_text())
WITH_ENERGY = [name for name, content in REFERENCE.items() if "energies" in content and "force_norms" in content]
DRAWN = [name for name, content in REFERENCE.items() if "samples" in content]
SYSTEMS = {2: DoubleWellParticles(4), 3: LennardJonesCluster(4)}


class Tethers:
    """Springs from every site to its place; it gives energies together with forces only."""

    def __init__(self, places, spring):
        self.places, self.spring = np.array(places), spring

    def energies_and_forces(self, positions):
        stretch = positions - self.places
        return 0.5 * self.spring * (stretch**2).sum((1, 2)), -self.spring * stretch


def close(found, expected):
    """To the rounding of sums in another order; networks of some models are in single precision."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=2e-6, atol=2e-6)


def target_of(model, reference):
    if "tethers" in reference:
        return Tethers(**reference["tethers"])
    return SYSTEMS[model.dimension] if model.kind == "equivariant_flow" else model


def test_every_kind_is_among_them():
    from importlib.metadata import entry_points

    kinds = {entry.name for entry in entry_points(group="flowbridge.model_kinds")}
    assert kinds == {content["kind"] for content in REFERENCE.values()}
    assert {file.stem for file in FOLDER.glob("*.flow")} == set(REFERENCE) - {"shipped"}


@pytest.mark.parametrize("name", sorted(set(REFERENCE) - {"shipped"}))
def test_saved_again_it_is_the_same_model(name, tmp_path):
    expected = REFERENCE[name]
    model = fb.load(FOLDER / f"{name}.flow")
    assert model.kind == expected["kind"]
    assert model.model_file.digest == expected["digest"]
    assert matches_its_file(model)
    save(model, tmp_path / "again.flow")
    again = fb.load(tmp_path / "again.flow").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    if isinstance(model, fb.Potential):
        metadata = model.metadata
        found = len(metadata.particles), metadata.temperature, metadata.periodic, metadata.rigid
        assert found == tuple(expected[key] for key in ("particles", "temperature", "periodic", "rigid"))


@pytest.mark.parametrize("name", WITH_ENERGY)
def test_energies_and_forces(name):
    expected = REFERENCE[name]
    model = fb.Potential.load(FOLDER / f"{name}.flow")
    positions = torch.tensor(expected["positions"], dtype=torch.float64)
    energy, forces = model.energy_and_forces(positions)
    close(energy, expected["energies"])
    close(forces.norm(dim=(1, 2)), expected["force_norms"])
    close(model.energies(positions), expected["energies"])


@pytest.mark.parametrize("name", DRAWN)
def test_samples_and_weights(name):
    expected = REFERENCE[name]["samples"]
    model = fb.load(FOLDER / f"{name}.flow")
    assert isinstance(model, fb.Generator)
    samples = model.sample(expected["count"], target_of(model, expected), seed=expected["seed"])
    close(samples.positions[0, 0], expected["first_position"])
    close(samples.reduced_potentials["target"], expected["target"])
    close(samples.reduced_potentials["generator"], expected["generator"])
    close(samples.log_weights, expected["log_weights"])


def test_a_map_carries_the_same_samples():
    expected = REFERENCE["rigid_body_map"]
    model = fb.load(FOLDER / "rigid_body_map.flow")
    found = (len(model.particles), model.base_temperature, model.temperature)
    assert found == tuple(expected[key] for key in ("particles", "base_temperature", "temperature"))
    positions, base = np.array(expected["positions"]), {"target": np.array(expected["base_target"])}
    warm = WeightedSamples(positions, np.zeros(len(positions)), model.particles, model.base_temperature, base)
    carried = model.weighted_samples(warm, Tethers(**expected["tethers"]))
    close(carried.positions[0, 4], expected["carried"]["first_position"])
    close(carried.log_weights, expected["carried"]["log_weights"])
    close(carried.reduced_potentials["target"], expected["carried"]["target"])
    close(carried.reduced_potentials["generator"], expected["carried"]["generator"])


@pytest.mark.parametrize("name", ["molecule_builder", "shipped"])
def test_builders_build_the_same_molecules(name):
    expected = REFERENCE[name]
    shipped = Path(str(files("flowbridge"))) / "models" / "molecules_cnof.flow"
    model = MoleculeBuilder.load(shipped if name == "shipped" else FOLDER / f"{name}.flow")
    assert model.model_file.digest == expected["digest"]
    built = expected["built"]
    made = model.sample(built["formula"], built["count"], torch.Generator().manual_seed(built["seed"]))
    close(made.positions[0, 1], built["first_position"])
    molecules = MoleculeSet(made.positions, made.elements, made.counts)
    close(model.log_prob(molecules).detach(), built["log_probs"])


def test_a_private_network_keeps_its_ledger(tmp_path):
    expected = REFERENCE["feed_forward_network"]
    model = FeedForwardNetwork.load(FOLDER / "feed_forward_network.flow")
    close(model.predict(torch.tensor(expected["inputs"], dtype=torch.float32)).detach(), expected["outputs"])
    assert model.privacy == expected["privacy"]
    assert ledger_of(model).epsilon == expected["privacy"]["epsilon"]
    save(model, tmp_path / "again.flow")
    assert fb.load(tmp_path / "again.flow").privacy == expected["privacy"]
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ModelFileError, match="changed after the private training"):
        save(model, tmp_path / "changed.flow")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("molecule_builder", "a builder of molecules"),
        ("feed_forward_network", "a network that classifies"),
        ("rigid_body_map", "a map of rigid bodies"),
    ],
)
def test_what_has_no_energy_is_refused_by_whatever_needs_one(name, what):
    """As an object and as a file, by a sentence that says what it is."""
    from flowbridge.calculators import PotentialCalculator
    from flowbridge.core.energy import as_batched_energy

    path = FOLDER / f"{name}.flow"
    model = fb.load(path)
    assert not isinstance(model, fb.Potential)
    assert not isinstance(model, fb.Generator)
    spring = fb.load(FOLDER / "lennard_jones_cluster.flow")
    for given in (model, path):
        for use in (
            lambda given=given: add_potential(particle_system(spring), given),
            lambda given=given: particle_system(given),
            lambda given=given: PotentialCalculator(given),
            lambda given=given: as_batched_energy(given),
        ):
            with pytest.raises((ValueError, CalculatorSetupError), match=what) as raised:
                use()
            assert "energy" in str(raised.value)


def test_a_file_of_another_class_says_what_it_holds():
    with pytest.raises(ConfigurationError, match=r"holds a coarse-grained force field of .*, not a Boltzmann"):
        fb.BoltzmannGenerator.load(FOLDER / "coarse_grained_force_field_graph.flow")
    with pytest.raises(
        ConfigurationError, match=r"expected a Boltzmann generator of one molecule or the path .* got a int"
    ):
        fb.BoltzmannGenerator.of(3)
