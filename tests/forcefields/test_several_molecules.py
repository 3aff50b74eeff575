"""One graph network trained on two short chains, used on a third."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.potential import Particles
from flowbridge.forcefields.beads.frames import BeadFrames
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.graph_network import GraphConfiguration, GraphNetwork
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.forcefields.training.augmented_flow import TeacherConfiguration
from flowbridge.forcefields.training.configuration import CoarseTrainingConfiguration
from flowbridge.forcefields.training.several_molecules import train_on_several_molecules

KT = 2.494338785445972
NETWORK = GraphConfiguration(width=16, filters=8, interactions=1, cutoff=1.2)
PRIOR = PriorConfiguration()


def chain(sequence: str) -> Particles:
    """Beads A and B, each its own residue."""
    count = len(sequence)
    return Particles(
        names=("CA",) * count,
        atomic_numbers=(0,) * count,
        masses=(100.0,) * count,
        bonds=tuple((i, i + 1) for i in range(count - 1)),
        residue_names=tuple({"A": "ALA", "B": "VAL"}[letter] for letter in sequence),
        residue_indices=tuple(range(count)),
    )


def attraction(beads: Particles, x: torch.Tensor) -> torch.Tensor:
    """A law of pairs, kJ/mol: depth and place of a well depend on both types."""
    kinds = torch.tensor([1.0 if name == "VAL" else 0.0 for name in beads.residue_names], dtype=torch.float64)
    energy = torch.zeros(len(x), dtype=torch.float64)
    for i in range(len(beads)):
        for j in range(i + 2, len(beads)):
            r = (x[:, i] - x[:, j]).norm(dim=-1)
            depth, place = (
                2.0 + 4.0 * kinds[i] * kinds[j] + 2.0 * (kinds[i] + kinds[j]),
                0.55 + 0.05 * (kinds[i] + kinds[j]),
            )
            energy = energy - depth * torch.exp(-0.5 * ((r - place) / 0.1) ** 2)
    return energy


def frames_of(beads: Particles, count: int, seed: int) -> BeadFrames:
    """Bent chains, and forces of the law, without those of bonds."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, len(beads) - 1, 3, generator=generator, dtype=torch.float64)
    steps = steps + torch.tensor([0.8, 0.0, 0.0], dtype=torch.float64)
    length = 0.38 + 0.01 * torch.randn(count, len(beads) - 1, 1, generator=generator, dtype=torch.float64)
    steps = length * steps / steps.norm(dim=-1, keepdim=True)
    x = torch.cat([torch.zeros(count, 1, 3, dtype=torch.float64), steps.cumsum(1)], 1)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(attraction(beads, leaf).sum(), leaf)
    prior = fit_prior(beads, x.numpy(), 300.0, PRIOR)
    return BeadFrames(x, prior.energy_and_forces(x).forces - gradient)


def settings(**student) -> CoarseTrainingConfiguration:
    stage = {"steps": 500, "batch": 64, "learning_rate": 1e-2, **student}
    return CoarseTrainingConfiguration.model_validate(
        {"method": "force_matching", "student": stage, "log_interval": 100, "checkpoint_interval": 30}
    )


def trained(sequences, folder, **student) -> list[CoarseGrainedForceField]:
    molecules = [(chain(one), frames_of(chain(one), 1500, 7 + n)) for n, one in enumerate(sequences)]
    results = train_on_several_molecules(
        molecules, 300.0, PRIOR, NETWORK, TeacherConfiguration(), settings(**student), folder, 3
    )
    assert all(result.metadata["held_out_force_error"] < 1.0 for result in results)
    return [result.force_field for result in results]


def transferred_error(field: CoarseGrainedForceField, sequence: str) -> float:
    """Return the mean square error of the network's forces on another sequence, over the forces' own mean square."""
    beads = chain(sequence)
    frames = frames_of(beads, 300, 99)
    prior = fit_prior(beads, frames.positions.numpy(), 300.0, PRIOR)
    other = field.transferred(prior, frames.positions)
    expected = frames.forces - prior.energy_and_forces(frames.positions).forces
    found = other.energy_and_forces(frames.positions).forces - prior.energy_and_forces(frames.positions).forces
    return float((found - expected).square().mean() / expected.square().mean())


def test_two_molecules_teach_a_third(tmp_path):
    """What is learned of pairs in two sequences holds in a longer one; a single sequence without a pair of B teaches less."""
    both = trained(("AABAA", "BABAB"), tmp_path / "both")
    assert transferred_error(both[0], "ABBABA") < 0.1
    assert transferred_error(both[1], "ABBABA") < 0.1
    (one,) = trained(("AABAA",), tmp_path / "one")
    assert transferred_error(one, "ABBABA") > 3.0 * transferred_error(both[0], "ABBABA")


def test_parameters_are_shared_in_training_and_copies_afterwards(tmp_path):
    first, second = trained(("AABAA", "BABAB"), tmp_path, steps=60)
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        first.network.embedding.weight.zero_()
    assert float(second.network.embedding.weight.detach().abs().max()) > 0.0
    assert second.network.vocabulary == ("ALA:CA", "VAL:CA")


def test_stopped_training_goes_on_to_the_same_numbers(tmp_path):
    (whole,) = trained(("AABAA",), tmp_path / "a", steps=60)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "student").rename(tmp_path / "b" / "student")  # its last checkpoint is all that is left
    (again,) = trained(("AABAA",), tmp_path / "b", steps=60)
    for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_serves_only_types_that_it_knows():
    network = GraphNetwork(chain("AAA"), NETWORK)
    assert network.serving(chain("AAAAA")).embedding is network.embedding
    with pytest.raises(ConfigurationError, match="does not know beads of type VAL:CA"):
        network.serving(chain("ABA"))


def test_what_cannot_be_learned_from(tmp_path):
    given = ([], TeacherConfiguration(), settings(), tmp_path, 1)
    with pytest.raises(ConfigurationError, match="there are no molecules"):
        train_on_several_molecules(given[0], 300.0, PRIOR, NETWORK, *given[1:])
    beads = chain("AAA")
    without = BeadFrames(frames_of(beads, 200, 1).positions)
    with pytest.raises(ConfigurationError, match="needs the forces on the atoms"):
        train_on_several_molecules([(beads, without)], 300.0, PRIOR, NETWORK, *given[1:])
