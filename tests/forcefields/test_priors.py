"""Prior terms: forces, statistics, and OpenMM's own forces."""

import numpy as np
import openmm
import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files.files import load, save
from flowbridge.core.units import thermal_energy
from flowbridge.forcefields.beads.graphs import bonded_angles, bonded_torsions, pairs_apart
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.forcefields.prior_terms import FourierTorsions, HarmonicAngles, HarmonicBonds, PriorEnergy
from flowbridge.integrations.openmm import particle_system
from flowbridge.integrations.openmm.forces.prior_forces import add_prior_forces
from flowbridge.integrations.openmm.sampling.torsion_bias import torsion_angles

ALL = PriorConfiguration(torsion_harmonics=3, repulsion=3200.0, repulsion_quantile=0.2)


def fitted(bead_frames, settings=ALL):
    mapping, frames = bead_frames
    return fit_prior(mapping.beads, frames, 300.0, settings), torch.from_numpy(frames)


class TestForces:
    @pytest.mark.parametrize("bonds", ["harmonic", "morse"])
    def test_against_finite_differences(self, bead_frames, bonds):
        prior, frames = fitted(bead_frames, ALL.model_copy(update={"bonds": bonds}))
        x = frames[7:8]
        _, forces = prior.energy_and_forces(x)
        step = 1e-6
        for bead in range(5):
            for axis in range(3):
                shift = torch.zeros_like(x)
                shift[0, bead, axis] = step
                slope = (prior(x + shift) - prior(x - shift)) / (2.0 * step)
                assert torch.isclose(forces[0, bead, axis], -slope[0], rtol=1e-5, atol=1e-3)

    def test_beads_on_a_line_have_finite_forces(self):
        line = torch.arange(4, dtype=torch.float64)[:, None] * torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
        terms = [
            HarmonicAngles([(0, 1, 2)], centres=[2.0], stiffness=[10.0]),
            FourierTorsions([(0, 1, 2, 3)], cosines=[[1.0]], sines=[[1.0]]),
        ]
        for term in terms:
            leaf = line[None].clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(term(leaf).sum(), leaf)
            assert bool(torch.isfinite(gradient).all())

    def test_native_openmm_forces_are_the_same(self, bead_frames):
        for bonds in ("harmonic", "morse"):
            prior, frames = fitted(bead_frames, ALL.model_copy(update={"bonds": bonds}))
            system = particle_system(prior)
            add_prior_forces(system, prior)
            integrator = openmm.VerletIntegrator(0.001)
            context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
            random = np.random.default_rng(1)
            for frame in frames[:5].numpy() + 0.02 * random.standard_normal((5, 5, 3)):
                context.setPositions(frame)
                state = context.getState(energy=True, forces=True)
                energy, forces = prior.energy_and_forces(torch.from_numpy(frame)[None])
                assert np.isclose(state.getPotentialEnergy()._value, float(energy), rtol=1e-9)
                assert np.allclose(
                    state.getForces(asNumpy=True)._value, forces[0].numpy(), atol=1e-6 * forces.abs().max()
                )

    def test_fourier_torsions_are_what_their_formula_says(self, bead_frames):
        _, frames = bead_frames
        term = FourierTorsions([(0, 1, 2, 3)], cosines=[[1.0, -2.0, 0.5]], sines=[[0.3, 0.7, -1.1]])
        angle = torsion_angles(frames, (0, 1, 2, 3))
        expected = sum(
            c * np.cos(n * angle) + s * np.sin(n * angle) for n, c, s in ((1, 1.0, 0.3), (2, -2.0, 0.7), (3, 0.5, -1.1))
        )
        assert np.allclose(term(torch.from_numpy(frames)).numpy(), expected, atol=1e-10)


class TestStatistics:
    def test_harmonic_springs_are_found(self):
        """Frames drawn from known springs give them back within the error of a variance."""
        random, frames = np.random.default_rng(0), 20_000
        beads = _pair()
        lengths = 0.15 + 0.004 * random.standard_normal(frames)
        positions = np.zeros((frames, 2, 3))
        positions[:, 1, 0] = lengths
        term = fit_prior(beads, positions, 300.0, PriorConfiguration()).term("bonds")
        assert isinstance(term, HarmonicBonds)
        expected = thermal_energy(300.0) / 0.004**2
        assert abs(float(term.stiffness) / expected - 1.0) < 4.0 * np.sqrt(2.0 / frames)
        assert abs(float(term.lengths) - 0.15) < 4.0 * 0.004 / np.sqrt(frames)

    def test_torsions_invert_their_histogram(self, bead_frames):
        mapping, frames = bead_frames
        prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(torsion_harmonics=4))
        phi = torsion_angles(frames, (0, 1, 2, 3))
        term = prior.term("torsions")
        energies = term.each(torch.from_numpy(frames))[:, 0].numpy()
        density, edges = np.histogram(phi, 24, (-np.pi, np.pi), density=True)
        place = np.digitize(phi, edges[1:-1])
        common = density[place] > 0.3 * density.max()
        assert np.corrcoef(energies[common], -np.log(density[place][common]))[0, 1] > 0.7

    def test_weights_count(self, bead_frames):
        mapping, frames = bead_frames
        weights = np.zeros(len(frames))
        weights[:400] = 2.0
        a = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(), weights).term("bonds")
        b = fit_prior(mapping.beads, frames[:400], 300.0, PriorConfiguration()).term("bonds")
        assert torch.allclose(a.stiffness, b.stiffness)

    def test_graphs(self, bead_frames):
        beads = bead_frames[0].beads
        assert bonded_angles(beads) == ((0, 1, 2), (1, 2, 3), (2, 3, 4))
        assert bonded_torsions(beads) == ((0, 1, 2, 3), (1, 2, 3, 4))
        assert pairs_apart(beads, 3) == ((0, 3), (0, 4), (1, 4))


class TestRefused:
    def test_too_few_frames(self, bead_frames):
        with pytest.raises(ConfigurationError, match="at least 20 frames"):
            fit_prior(bead_frames[0].beads, bead_frames[1][:5], 300.0, PriorConfiguration())

    def test_broken_molecules(self, bead_frames):
        mapping, frames = bead_frames
        broken = frames.copy()
        broken[3, 4] += 2.0
        with pytest.raises(ConfigurationError, match=r"broken in 1 of \d+ frames: in frame 3 beads 3 and 4 \(C, N\)"):
            fit_prior(mapping.beads, broken, 300.0, PriorConfiguration())

    def test_rigid_bonds(self, bead_frames):
        mapping, frames = bead_frames
        with pytest.raises(ConfigurationError, match=r"bond C-N .* does not vary"):
            fit_prior(mapping.beads, np.repeat(frames[:1], 50, 0), 300.0, PriorConfiguration())

    def test_beads_out_of_range(self, bead_frames):
        term = HarmonicBonds([(0, 5)], lengths=[0.1], stiffness=[1.0])
        with pytest.raises(ConfigurationError, match="name bead 5 of 5"):
            PriorEnergy(bead_frames[0].beads, [term], 300.0)


def test_saved_and_loaded(bead_frames, tmp_path):
    prior, frames = fitted(bead_frames)
    save(prior, tmp_path / "prior.flow")
    assert torch.equal(load(tmp_path / "prior.flow")(frames[:4]), prior(frames[:4]))


def _pair():
    from flowbridge.core.potential import Particles

    return Particles(("A", "B"), (0, 0), (10.0, 10.0), ((0, 1),))
