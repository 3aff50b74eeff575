"""The builder: its density is one, in space, whichever way it is turned, and its samples are of it."""

import itertools
import math

import numpy as np
import pytest
import torch

import flowbridge
from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.configuration import BuilderConfiguration
from flowbridge.flows.molecules.formulas import ELEMENTS, Formula
from flowbridge.flows.molecules.molecule_sets import MoleculeSet
from flowbridge.flows.molecules.partial_molecules import PartialMolecules, Placements, frames_at

SMALL = BuilderConfiguration(width=16, layers=2, radial=8, channels=4, components=3, torsions=12, seed=3)


def builder(blunt: bool = False) -> MoleculeBuilder:
    """A small untrained builder in float64, away from its initial parameters so that nothing is even by chance."""
    model = MoleculeBuilder(SMALL).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if blunt:  # broad enough for quadrature: the widest scales, whatever the state
        count = SMALL.components
        for head, last in (
            (model.network.distance, count),
            (model.network.cosine, count),
            (model.network.torsion_scale, 1),
        ):
            head[-1].weight.data[-last:] = 0.0
            head[-1].bias.data[-last:] = 3.0
    return model


def set_of(built) -> MoleculeSet:
    return MoleculeSet(built.positions, built.elements, built.counts)


def rotation(seed: int) -> torch.Tensor:
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return torch.from_numpy(matrix * np.sign(np.linalg.det(matrix)))


@pytest.fixture(scope="module")
def model() -> MoleculeBuilder:
    return builder()


@pytest.fixture(scope="module")
def built(model):
    formulas = [Formula.parse(text) for text in ("C2H6O", "CH4", "C3H4FN", "H2O", "C4H4O2")]
    return model.sample(formulas, 5, torch.Generator().manual_seed(2))


class TestStoichiometry:
    @pytest.mark.parametrize("formula", ["C3H5NO2", "H2", "CF4", "C6H6", "HF"])
    def test_every_sample_has_the_formula(self, model, formula):
        made = model.sample(formula, 20, torch.Generator().manual_seed(1))
        for index in range(20):
            numbers, positions = made.molecule(index)
            assert Formula.of_atomic_numbers(numbers.tolist()) == Formula.parse(formula)
            assert torch.isfinite(positions).all()

    def test_hydrogens_come_last(self, built):
        for elements, count in zip(built.elements, built.counts, strict=True):
            heavy = elements[:count] != ELEMENTS.index("H")
            assert (heavy.int().diff() <= 0).all()

    def test_same_seed_same_molecules(self, model):
        first, second = (model.sample("C2H5NO", 3, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first.positions, second.positions)


class TestSymmetry:
    @pytest.mark.parametrize("reflected", [False, True])
    def test_density_is_invariant(self, model, built, reflected):
        molecules = set_of(built)
        matrix = rotation(4) * (-1.0 if reflected else 1.0)
        moved = molecules._replace(positions=molecules.positions @ matrix.T + torch.tensor([0.3, -2.0, 1.0]))
        with torch.no_grad():
            assert torch.allclose(model.log_prob(moved), model.log_prob(molecules), rtol=0, atol=1e-7)

    def test_density_depends_on_the_order_and_its_estimate_does_not_depend_on_numbering(self, model, built):
        molecules = set_of(built).select(torch.tensor([3]))  # water
        with torch.no_grad():
            exact = torch.logsumexp(all_orders(model, molecules), 0)
            renumbered = molecules.permuted(torch.tensor([[2, 0, 1]]))
            assert torch.allclose(torch.logsumexp(all_orders(model, renumbered), 0), exact)

    def test_reflection_turns_torsions_over(self, built):
        molecules = set_of(built).select(torch.tensor([0]))
        steps = torch.tensor([6])
        state = molecules.states(steps)
        mirrored = molecules._replace(positions=molecules.positions * torch.tensor([1.0, 1.0, -1.0]))
        for focus in range(6):
            at = torch.tensor([focus])
            one = molecules.placements(steps, state, at)
            other = mirrored.placements(steps, mirrored.states(steps), at)
            assert torch.allclose(one.cosine, other.cosine)
            assert abs(math.remainder(float(one.torsion + other.torsion), 2 * math.pi)) < 1e-9


def all_orders(model, molecules: MoleculeSet) -> torch.Tensor:
    """Log-densities of every order of one molecule."""
    count = int(molecules.counts)
    orders = torch.tensor(list(itertools.permutations(range(count))))
    copies = molecules.select(torch.zeros(len(orders), dtype=torch.long))
    return model.log_prob(copies, orders)


class TestDensity:
    def test_the_last_atom_integrates_to_one(self):
        """Quadrature over all of space around three placed atoms, whatever the new atom was attached to."""
        model = builder(blunt=True)
        core = torch.tensor([[0.0, 0.0, 0.0], [0.13, 0.0, 0.0], [0.19, 0.11, 0.02]], dtype=torch.float64)
        state = PartialMolecules(
            core[None], torch.tensor([[1, 1, 3]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1, 1, 0, 0, 0]])
        )
        # Each focus's term in its own coordinates. Carbon is the only element allowed: hydrogen waits.
        logs, log_weights = gauss_legendre(math.log(0.02), math.log(1.0), 40)
        cosines, cosine_weights = gauss_legendre(-1.0, 1.0, 20)
        turns = torch.arange(20, dtype=torch.float64) * 2 * math.pi / 20
        distance, cosine, torsion = torch.cartesian_prod(logs.exp(), cosines, turns).T
        volume = torch.cartesian_prod(log_weights, cosine_weights, torch.full((20,), math.pi / 10).double()).prod(1)
        volume = volume * distance**3
        states = state.select(torch.zeros(len(distance), dtype=torch.long))
        total = 0.0
        with torch.no_grad():
            for focus in range(3):
                at = torch.full((len(distance),), focus)
                frames = frames_at(states, at)
                position = frames.place(distance, cosine, torsion)
                choices = Placements(at, torch.ones_like(at), *frames.coordinates(position))
                density = (model.choice_log_probs(states, choices) - 2 * choices.distance.log()).exp()
                total += float((volume * density).sum())
        assert total == pytest.approx(1.0, abs=2e-3)

    def test_the_volume_element_is_the_square_of_the_distance(self, built):
        molecules = set_of(built)
        frames = frames_at(molecules.states(torch.full((5,), 3)), torch.tensor([2, 1, 0, 2, 1]))

        def place(values):
            return frames.place(values[:, 0], values[:, 1], values[:, 2])

        values = torch.tensor([[0.15, -0.3, 2.0]] * 5, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(place, values)[torch.arange(5), :, torch.arange(5)]
        assert torch.allclose(torch.linalg.det(jacobian).abs(), torch.full((5,), 0.15**2, dtype=torch.float64))
        back = torch.stack(frames.coordinates(place(values)), 1)
        assert torch.allclose(back, values)

    def test_choices_of_samples_have_the_density_that_sampling_reports(self, model, built):
        molecules = set_of(built)
        steps = torch.tensor([4, 3, 5, 2, 7])
        index = torch.arange(5)
        focus = built.placements.focus[index, steps]
        state = molecules.states(steps)
        with torch.no_grad():
            again = model.choice_log_probs(state, molecules.placements(steps, state, focus))
        assert torch.allclose(again, built.log_probs[index, steps], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("atom", [1, 2, 3])
    def test_samples_are_of_the_density(self, built, atom):
        """Shares of samples against shares by quadrature of each mixture, in the states where it is used."""
        model = builder(blunt=True)
        state = set_of(built).select(torch.tensor([0])).states(torch.tensor([3]))
        states = state.select(torch.zeros(4000, dtype=torch.long))
        focus, element = torch.full((4000,), atom - 1), torch.full((4000,), 1)
        distance, cosine = torch.full((4000,), 0.15).double(), torch.full((4000,), -0.3).double()
        generator = torch.Generator().manual_seed(atom)
        with torch.no_grad():
            features = model.network.features(states)
            frames = frames_at(states, focus)
            mixtures = (
                (model.network.distance_density(features[:, atom - 1], element), (0.005, 3.0)),
                (model.network.cosine_density(features, frames, focus, element, distance), (-1.0, 1.0)),
                (
                    model.network.torsion_density(features, states, frames, focus, element, distance, cosine),
                    (0.0, 2 * math.pi),
                ),
            )
            for mixture, (low, high) in mixtures:
                sample = mixture.sample(generator)
                if high > 6:
                    sample = sample.remainder(high)
                grid = torch.linspace(low, high, 4000, dtype=torch.float64)
                share = torch.cumulative_trapezoid(mixture.log_prob(grid).exp(), grid)
                assert float(share[-1]) == pytest.approx(1.0, abs=1e-3)
                for cut in (500, 1000, 2000, 3000):
                    assert float((sample < grid[cut + 1]).double().mean()) == pytest.approx(float(share[cut]), abs=0.04)

    def test_estimate_over_orders_is_unbiased(self, model, built):
        molecules = set_of(built).select(torch.tensor([0]))  # C2H6O, nine atoms
        hydrogens_apart = molecules.select(torch.tensor([0]))._replace(counts=torch.tensor([4]))
        small = hydrogens_apart.select(torch.tensor([0]))  # C, C, O and one hydrogen
        copies = small.select(torch.zeros(400, dtype=torch.long))
        with torch.no_grad():
            exact = torch.logsumexp(all_orders(model, small), 0)
            estimates = model.estimate_log_prob(copies, 1, torch.Generator().manual_seed(3), jumps=0.5)
        ratios = (estimates - exact).exp()
        assert float(ratios.mean()) == pytest.approx(1.0, abs=5 * float(ratios.std()) / 20)
        assert float(ratios.std()) > 0.01  # the orders do differ

    def test_orders_that_place_hydrogen_early_have_no_density(self, model, built):
        molecules = set_of(built).select(torch.tensor([3]))
        assert model.log_prob(molecules, torch.tensor([[1, 0, 2]])).item() == -math.inf


def gauss_legendre(low: float, high: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    points, weights = np.polynomial.legendre.leggauss(count)
    half = (high - low) / 2
    return torch.from_numpy(low + half * (points + 1)), torch.from_numpy(weights * half)


class TestOrders:
    def test_probabilities_of_all_orders_add_up(self, built):
        molecules = set_of(built).select(torch.tensor([3]))
        copies = molecules.select(torch.zeros(2000, dtype=torch.long))
        drawn = copies.draw_orders(torch.Generator().manual_seed(1), jumps=0.3)
        found = {tuple(row.tolist()): float(p.exp()) for row, p in zip(drawn.rows, drawn.log_probs, strict=True)}
        assert sum(found.values()) == pytest.approx(1.0)
        for row, probability in found.items():
            share = float((drawn.rows == torch.tensor(row)).all(1).double().mean())
            assert share == pytest.approx(probability, abs=5 * math.sqrt(0.25 / 2000))


class TestFile:
    def test_saved_and_loaded_builders_are_the_same(self, model, built, tmp_path):
        flowbridge.save(model, tmp_path / "builder.flow")
        loaded = flowbridge.load(tmp_path / "builder.flow")
        assert isinstance(loaded, MoleculeBuilder)
        with torch.no_grad():
            assert torch.equal(loaded.log_prob(set_of(built)), model.log_prob(set_of(built)))


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("CH3", "radical"),
            ("CH5N+", "charged"),
            ("C2H7F", "no connected molecule"),
            ("CH6", "no connected molecule"),
            ("SiH4", "Si"),
            ("c2h6", "cannot read"),
            ("", "cannot read"),
            ("C", "no connected molecule"),
            ("CH2", "no connected molecule"),
            ("C2", "no connected molecule"),
            ("C0H0", "at least one atom"),
        ],
    )
    def test_formulas_that_no_molecule_has(self, model, text, reason):
        with pytest.raises(ConfigurationError, match=reason):
            model.sample(text, 1, torch.Generator())

    def test_no_molecules(self, model):
        with pytest.raises(ConfigurationError, match="must be positive"):
            model.sample("CH4", 0, torch.Generator())
        with pytest.raises(ConfigurationError, match="2 formulas for 3"):
            model.sample([Formula.parse("CH4")] * 2, 3, torch.Generator())

    @pytest.mark.parametrize(
        ("numbers", "positions", "reason"),
        [
            ([14], np.zeros((1, 3)), "atomic number 14"),
            ([6, 1], np.zeros((1, 3)), r"\(2, 3\)"),
            ([6], np.full((1, 3), np.nan), "finite"),
        ],
    )
    def test_molecules_that_cannot_be_read(self, numbers, positions, reason):
        with pytest.raises(ConfigurationError, match=reason):
            MoleculeSet.of([(numbers, positions)])

    def test_no_molecules_to_read(self):
        with pytest.raises(ConfigurationError, match="no molecules"):
            MoleculeSet.of([])
