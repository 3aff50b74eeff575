"""Layers, generators and maps of rigid bodies: determinants, signs, free energies, model files, training."""

import math

import numpy as np
import pytest
import torch

import flowbridge
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.potential import Potential
from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.targeted_free_energy import targeted_free_energy
from flowbridge.flows.rigid.configuration import RigidFlowConfiguration, RigidFlowTraining
from flowbridge.flows.rigid.crystal import CrystalCoordinates, RigidChain, from_flat, to_flat
from flowbridge.flows.rigid.energies import BodyEnergy
from flowbridge.flows.rigid.generator import RigidBodyGenerator
from flowbridge.flows.rigid.harmonic import HarmonicBase, HarmonicMap, orientation_log_volume
from flowbridge.flows.rigid.maps.layers import FluctuationScales, coupling_layers
from flowbridge.flows.rigid.maps.quaternions import random_orientations
from flowbridge.flows.rigid.relaxation import relaxed
from flowbridge.flows.rigid.temperature_map import RigidBodyMap
from flowbridge.flows.rigid.training import Frames, draws_of, train_by_likelihood, train_by_work
from flowbridge.flows.rigid.works import summary, works_of

SMALL = {"repetitions": 2, "channels": 8, "heads": 2, "blocks": 1, "components": 3}
DESIGNS = [
    {"orientations": "moebius"},
    {"orientations": "moebius", "halves": True},
    {"orientations": "convex_gradient", "halves": True, "closed": "inverse"},
    {"orientations": "convex_gradient", "closed": "forward", "first_exponent": 0.7, "least_exponent": 0.5},
]


def flat_samples(count, dimension, seed=0):
    return 0.1 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(flow, seed=0):
    """Give parameters that are zero at first a value, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return flow


def random_flow(crystal, design):
    configuration = RigidFlowConfiguration.model_validate({**SMALL, **design})
    harmonic = HarmonicMap.contraction(flat_samples(1, 15)[0], 0.01 * torch.eye(15, dtype=torch.float64), 0.7)
    return shaken(
        RigidChain([harmonic, *coupling_layers(crystal, configuration, FluctuationScales(0.1, 0.1))])
    ).double()


def test_exponents_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"least_exponent = 1\.0 must be less than first_exponent = 0\.7"):
        RigidFlowConfiguration(first_exponent=0.7)
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.5"):
        RigidFlowConfiguration(first_exponent=0.7, least_exponent=0.4)


@pytest.mark.parametrize("design", DESIGNS)
class TestLayers:
    def test_log_determinants_are_those_of_the_jacobian(self, three_bodies, design):
        flow = random_flow(three_bodies.crystal, design)

        def mapping(flat):
            return to_flat(flow(from_flat(flat.unsqueeze(0), 3)).value)[0]

        for flat in flat_samples(3, 15):
            before = from_flat(flat.unsqueeze(0), 3)
            after, log_det = flow(before)
            jacobian = torch.autograd.functional.jacobian(mapping, flat)
            volumes = orientation_log_volume(after) - orientation_log_volume(before)
            expected = torch.linalg.slogdet(jacobian).logabsdet + volumes[0]
            assert float(log_det.detach()) == pytest.approx(float(expected), abs=1e-8)

    def test_inverse_undoes_it(self, three_bodies, design):
        flow, flat = random_flow(three_bodies.crystal, design), flat_samples(20, 15)
        value, log_det = flow(from_flat(flat, 3))
        assert not torch.allclose(to_flat(value), flat, atol=1e-2)
        back, other = flow.inverse(value)
        assert torch.allclose(to_flat(back), flat, atol=1e-9)
        assert torch.allclose(log_det, -other, atol=1e-8)

    def test_signs_of_quaternions_change_nothing(self, three_bodies, design):
        flow, start = random_flow(three_bodies.crystal, design), from_flat(flat_samples(8, 15), 3)
        signs = torch.randint(2, (8, 3, 1), generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
        first, second = flow(start), flow(start._replace(orientations=signs * start.orientations))
        assert torch.allclose(to_flat(first.value), to_flat(second.value), atol=1e-12)
        assert torch.allclose(first.log_det, second.log_det, atol=1e-12)

    def test_the_first_body_carries_the_frame(self, three_bodies, design):
        flow = random_flow(three_bodies.crystal, design)
        assert not flow(from_flat(flat_samples(3, 15), 3)).value.displacements[:, 0].any()


def test_the_map_between_normal_distributions_is_exact():
    a, b = (torch.cov(flat_samples(100, 15, seed).T) for seed in (1, 2))
    mapping = HarmonicMap.between(torch.ones(15, dtype=torch.float64), a, torch.zeros(15, dtype=torch.float64), b)
    assert torch.allclose(mapping.start @ a @ mapping.start.T, b, atol=1e-12)
    with pytest.raises(ConfigurationError, match="not positive definite"):
        HarmonicMap.between(torch.zeros(15), torch.cov(flat_samples(8, 15).T), torch.zeros(15), b)


def test_the_harmonic_base_integrates_to_one():
    """By importance sampling from a wider one; its chart reaches all orientations."""
    base, wide = (HarmonicBase(torch.zeros(3), size * torch.eye(3)) for size in (0.3, 0.6))
    drawn = wide.sample(200_000, torch.Generator().manual_seed(0))
    ratios = (base.log_prob(drawn) - wide.log_prob(drawn)).exp()
    assert float(ratios.mean()) == pytest.approx(1.0, abs=4 * float(ratios.std()) / math.sqrt(len(ratios)))
    # And against the uniform distribution, by which shares of orientations are measured.
    orientations = random_orientations((200_000, 1), torch.Generator().manual_seed(1))
    density = base.log_prob(CrystalCoordinates(torch.zeros(200_000, 1, 3, dtype=torch.float64), orientations)).exp()
    assert float(density.mean()) == pytest.approx(1.0, abs=4 * float(density.std()) / math.sqrt(200_000))


class TestGenerator:
    def generator(self, system, temperature=300.0, **design):
        start = system.crystal.configuration(
            from_flat(torch.zeros(1, 6 * system.bodies.count - 3).double(), system.bodies.count)
        )
        found = relaxed(BodyEnergy(system.bodies, system.energy), start, system.crystal.box)
        configuration = RigidFlowConfiguration.model_validate({**SMALL, **design})
        return RigidBodyGenerator.harmonic(
            system.particles, temperature, system.bodies, found.crystal, found.curvature, configuration
        )

    def test_absolute_free_energy(self, three_bodies):
        """Of the harmonic start, whose weights are exact whatever it lacks."""
        model = self.generator(three_bodies, repetitions=0)
        samples = model.sample(4000, three_bodies.energy, seed=1)
        assert samples.effective_sample_percent() > 90
        log_weights = samples.log_weights
        estimate = -(np.logaddexp.reduce(log_weights) - math.log(len(log_weights)))
        error = np.exp(log_weights - log_weights.max()).std() / np.exp(log_weights - log_weights.max()).mean() / 63
        assert estimate == pytest.approx(three_bodies.free_energy(300.0), abs=4 * error)

    def test_saved_and_loaded(self, three_bodies, tmp_path):
        model = self.generator(three_bodies)
        shaken(model.flow)
        flowbridge.save(model, tmp_path / "bodies.flow")
        again = flowbridge.load(tmp_path / "bodies.flow")
        positions = model.example_positions(5, torch.Generator().manual_seed(1))
        assert torch.equal(model(positions), again(positions))
        assert again.metadata == model.metadata

    def test_energy_is_a_function_of_sites_with_the_right_forces(self, three_bodies):
        model = self.generator(three_bodies)
        shaken(model.flow).double()
        positions = model.example_positions(1, torch.Generator().manual_seed(2))
        energy, forces = model.energy_and_forces(positions)
        assert torch.allclose(forces.sum(1), torch.zeros(1, 3, dtype=torch.float64), atol=1e-6)
        # Along rigid motions of one body, which is where the energy is defined.
        configuration = model.bodies.configuration(positions)
        step = 1e-5
        for change in (torch.tensor([step, 0.0, 0.0]), torch.tensor([0.0, 0.0, step])):
            shift = torch.zeros(1, 3, 3, dtype=torch.float64)
            shift[0, 1] = change
            ends = [
                model.bodies.places(configuration._replace(positions=configuration.positions + s))
                for s in (shift, -shift)
            ]
            slope = float(model(ends[0]) - model(ends[1])) / (2 * step)
            assert float(-(forces * (ends[0] - ends[1])).sum()) / (2 * step) == pytest.approx(slope, rel=1e-5)
            turned = configuration.orientations.clone()
            turned[0, 2, 1:] += change
            back = configuration.orientations.clone()
            back[0, 2, 1:] -= change
            ends = [
                model.bodies.places(configuration._replace(orientations=torch.nn.functional.normalize(q, dim=-1)))
                for q in (turned, back)
            ]
            slope = float(model(ends[0]) - model(ends[1])) / (2 * step)
            assert float(-(forces * (ends[0] - ends[1])).sum()) / (2 * step) == pytest.approx(slope, rel=1e-5)
        assert energy.dtype == torch.float64

    def test_cells(self, three_bodies, one_body):
        model = self.generator(three_bodies)
        positions = model.example_positions(2, torch.Generator().manual_seed(2))
        cell = 2.0 * torch.eye(3).expand(2, 3, 3)
        assert torch.equal(model(positions, cell), model(positions))
        with pytest.raises(ConfigurationError, match="belongs to one volume"):
            model(positions, 1.01 * cell)
        alone = RigidBodyGenerator.of_one_body(one_body.particles, 300.0, one_body.bodies, torch.zeros(3))
        with pytest.raises(ConfigurationError, match="in the open"):
            alone(positions[:, :4], cell)

    def test_several_bodies_need_a_harmonic_base(self, three_bodies):
        from flowbridge.flows.rigid.harmonic import UniformBase

        with pytest.raises(ConfigurationError, match="harmonic base"):
            RigidBodyGenerator(
                three_bodies.particles, 300.0, three_bodies.bodies, three_bodies.crystal, UniformBase(),
                RigidFlowConfiguration(), FluctuationScales(1.0, 1.0),
            )  # fmt: skip


def drawn_from(system, temperature, count, seed=0):
    """Return equally weighted samples of tethered bodies, by resampling a harmonic crystal."""
    curvature = BodyEnergy(system.bodies, system.energy)
    start = system.crystal.configuration(
        from_flat(torch.zeros(1, 6 * system.bodies.count - 3).double(), system.bodies.count)
    )
    found = relaxed(curvature, start, system.crystal.box)
    model = RigidBodyGenerator.harmonic(
        system.particles,
        temperature,
        system.bodies,
        found.crystal,
        found.curvature,
        RigidFlowConfiguration(repetitions=0),
    )
    samples = model.sample(4 * count, system.energy, seed).resample(count, seed)
    return found.crystal, samples


class TestMap:
    def test_targeted_free_energy(self, three_bodies):
        crystal, hot = drawn_from(three_bodies, 300.0, 1500)
        _, cold = drawn_from(three_bodies, 120.0, 1500, seed=1)
        model = RigidBodyMap.untrained(
            three_bodies.bodies, crystal, hot, 120.0, RigidFlowConfiguration.model_validate(SMALL)
        )
        found = targeted_free_energy(hot, cold, three_bodies.energy, three_bodies.energy, model.configuration_map())
        expected = three_bodies.free_energy(120.0) - three_bodies.free_energy(300.0)
        assert found.difference.error < 0.05
        assert found.difference.value == pytest.approx(expected, abs=4 * found.difference.error)
        assert found.forward == pytest.approx(expected, abs=0.1)

    def test_weighted_samples_are_of_the_other_temperature(self, three_bodies):
        crystal, hot = drawn_from(three_bodies, 300.0, 3000)
        model = RigidBodyMap.untrained(three_bodies.bodies, crystal, hot, 120.0, RigidFlowConfiguration(repetitions=0))
        carried = model.weighted_samples(hot, three_bodies.energy)
        assert carried.temperature == 120.0
        assert carried.effective_sample_percent() > 50
        step = 1.0
        slope = (three_bodies.free_energy(120.0 + step) - three_bodies.free_energy(120.0 - step)) / (2 * step)
        expected = -slope * 120.0  # <u> = -T df/dT
        estimate = carried.average(carried.reduced_potentials["target"])
        assert float(estimate.value) == pytest.approx(expected, abs=4 * float(estimate.error))

    def test_log_weights_are_the_works_with_the_other_sign(self, three_bodies):
        crystal, hot = drawn_from(three_bodies, 300.0, 200)
        model = RigidBodyMap.untrained(
            three_bodies.bodies, crystal, hot, 120.0, RigidFlowConfiguration.model_validate(SMALL)
        )
        shaken(model.flow)
        frames, target = model.frames(hot, three_bodies.energy), model.ensemble(three_bodies.energy)
        works = works_of(model.flow, frames.coordinates, frames.reduced, target)
        assert works.std() > 1.0
        weighted = model.weighted_samples(hot, three_bodies.energy)
        # The first body stays where it was, on its site in these samples.
        assert np.allclose(weighted.log_weights, -works, atol=1e-6)
        found = summary(works)
        assert found.free_energy <= found.mean
        assert found.effective_percent == pytest.approx(weighted.effective_sample_percent(), rel=1e-6)

    def test_saved_and_loaded(self, three_bodies, tmp_path):
        crystal, hot = drawn_from(three_bodies, 300.0, 200)
        model = RigidBodyMap.untrained(
            three_bodies.bodies, crystal, hot, 120.0, RigidFlowConfiguration.model_validate(SMALL)
        )
        flowbridge.save(model, tmp_path / "cooling.flow")
        again = flowbridge.load(tmp_path / "cooling.flow")
        first, second = (one.weighted_samples(hot, three_bodies.energy) for one in (model, again))
        assert np.array_equal(first.positions, second.positions)
        assert np.array_equal(first.log_weights, second.log_weights)

    def test_refusals(self, three_bodies):
        crystal, hot = drawn_from(three_bodies, 300.0, 200)
        model = RigidBodyMap.untrained(three_bodies.bodies, crystal, hot, 120.0)
        with pytest.raises(ConfigurationError, match="no energy of its own"):
            Potential.of(model)
        other = WeightedSamples(hot.positions, hot.log_weights, hot.particles, 310.0)
        with pytest.raises(ConfigurationError, match="starts at 300"):
            model.weighted_samples(other, three_bodies.energy)
        strange = three_bodies.particles.to_dict() | {"names": ["X"] * 12}
        with pytest.raises(MoleculeMismatchError, match="other particles"):
            model.frames(
                WeightedSamples(hot.positions, hot.log_weights, type(hot.particles).from_dict(strange), 300.0),
                three_bodies.energy,
            )


class Broken:
    """An energy that has none."""

    def energies_and_forces(self, positions):
        return np.full(len(positions), np.nan), np.full_like(positions, np.nan)


class TestTraining:
    SETTINGS = RigidFlowTraining(steps=40, batch=64, learning_rate=3e-2, checkpoint_interval=20)

    def model(self, one_body):
        design = RigidFlowConfiguration(orientations="convex_gradient", components=3, repetitions=1)
        return RigidBodyGenerator.of_one_body(one_body.particles, 300.0, one_body.bodies, torch.zeros(3), design)

    def test_work_comes_down_to_the_free_energy(self, one_body, tmp_path):
        """From all orientations alike to a tethered body."""
        soft = type(one_body.energy)(one_body.energy.places, 200.0)
        one_body.energy = soft
        model = self.model(one_body)
        # The identity orientation of the flow's crystal against the tethers' own: learned.
        curve = train_by_work(model.flow, draws_of(model.base), model.ensemble(soft), self.SETTINGS, tmp_path, seed=1)
        exact = one_body.free_energy(300.0)
        assert curve.loss[-1] > exact - 0.3
        assert curve.loss[-1] < curve.loss[0]
        samples = model.sample(5000, soft, seed=2)
        assert samples.effective_sample_percent() > 60
        estimate = -(np.logaddexp.reduce(samples.log_weights) - math.log(5000))
        assert estimate == pytest.approx(exact, abs=0.05)

    def test_interrupted_training_goes_on_to_the_same_parameters(self, one_body, tmp_path):
        class Stopped(Exception):
            pass

        def stop(done, total):
            if done == 30:
                raise Stopped

        whole, broken = self.model(one_body), self.model(one_body)
        arguments = (draws_of(whole.base), whole.ensemble(one_body.energy), self.SETTINGS)
        train_by_work(whole.flow, *arguments, tmp_path / "a", seed=1)
        with pytest.raises(Stopped):
            train_by_work(broken.flow, *arguments, tmp_path / "b", seed=1, progress=stop)
        again = self.model(one_body)
        train_by_work(again.flow, *arguments, tmp_path / "b", seed=1)
        assert all(torch.equal(a, b) for a, b in zip(whole.flow.parameters(), again.flow.parameters(), strict=True))
        other = self.SETTINGS.model_copy(update={"batch": 32})
        with pytest.raises(ConfigurationError, match="other settings"):
            train_by_work(again.flow, *arguments[:2], other, tmp_path / "b", seed=1)

    def test_likelihood_covers_every_mode(self, one_body, tmp_path):
        """Half of the samples at each of two orientations."""
        model = self.model(one_body)
        centres = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        noise = 0.2 * torch.randn(2000, 4, generator=generator, dtype=torch.float64)
        orientations = torch.nn.functional.normalize(centres.repeat(1000, 1) + noise, dim=-1).unsqueeze(1)
        data = CrystalCoordinates(torch.zeros(2000, 1, 3, dtype=torch.float64), orientations)
        settings = self.SETTINGS.model_copy(update={"steps": 150})
        train_by_likelihood(model.flow, model.base, data, settings, tmp_path, seed=1, held_out=data)
        latent = model.base.sample(2000, generator)
        drawn = model.flow(latent).value.orientations[:, 0]
        near = (drawn @ centres.T).abs().argmax(1)
        assert 0.4 < float(near.double().mean()) < 0.6
        assert float((drawn @ centres.T).abs().amax(1).mean()) > 0.9

    def test_held_out_frames_keep_the_start_where_training_makes_it_worse(self, three_bodies, tmp_path):
        crystal, hot = drawn_from(three_bodies, 300.0, 200)
        model = RigidBodyMap.untrained(
            three_bodies.bodies, crystal, hot, 120.0, RigidFlowConfiguration.model_validate(SMALL)
        )
        before = {name: value.clone() for name, value in model.flow.state_dict().items()}
        frames = model.frames(hot, three_bodies.energy)
        # A learning rate at which nothing good can come out.
        settings = RigidFlowTraining(steps=10, batch=8, learning_rate=3.0, checkpoint_interval=5)
        target = model.ensemble(three_bodies.energy)
        curve = train_by_work(model.flow, frames[:100].draw, target, settings, tmp_path, seed=1, held_out=frames[100:])
        assert curve.held_out[0] == min(curve.held_out)
        assert all(torch.equal(value, before[name]) for name, value in model.flow.state_dict().items())

    def test_refusals(self, one_body, tmp_path):
        model = self.model(one_body)
        with pytest.raises(NonFiniteEnergyError, match="have no finite energy"):
            train_by_work(model.flow, draws_of(model.base), model.ensemble(Broken()), self.SETTINGS, tmp_path, seed=1)
        harmonic = RigidChain([HarmonicMap.untrained(1)])
        with pytest.raises(ConfigurationError, match="nothing to train"):
            train_by_work(harmonic, draws_of(model.base), model.ensemble(Broken()), self.SETTINGS, tmp_path, seed=1)
        rest = CrystalCoordinates(torch.zeros(2, 1, 3), torch.ones(2, 1, 4) / 2)
        with pytest.raises(NonFiniteEnergyError, match="1 of 2 frames"):
            Frames(rest, torch.tensor([0.0, math.nan]))
