"""Small chains of beads, and a force field of capped alanine's five beads."""

import openmm
import pytest
import torch
from openmm import app

from flowbridge.core.potential import Particles
from flowbridge.forcefields.beads.mappings import five_beads
from flowbridge.forcefields.coarse_grained_force_field import CoarseGrainedForceField
from flowbridge.forcefields.networks.invariant_network import InvariantConfiguration
from flowbridge.forcefields.prior_statistics import PriorConfiguration, fit_prior
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_langevin


def chain(count: int) -> Particles:
    return Particles(
        names=("CA",) * count,
        atomic_numbers=(0,) * count,
        masses=(110.0,) * count,
        bonds=tuple((i, i + 1) for i in range(count - 1)),
        residue_names=("ALA",) * count,
        residue_indices=tuple(range(count)),
    )


@pytest.fixture(scope="session")
def alanine_run(alanine):
    """Positions and forces of capped alanine with constrained hydrogens, and the constraints."""
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
        alanine.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    xml = openmm.XmlSerializer.serialize(system)
    run = LangevinRun(xml, alanine.positions, 300.0, 0.002, 5.0, 2000, 25, 1200, 1, None)
    pairs = [tuple(system.getConstraintParameters(n)[:2]) for n in range(system.getNumConstraints())]
    return run_langevin(run), pairs


@pytest.fixture(scope="session")
def bead_frames(alanine, alanine_run):
    """The mapping to five beads, and its frames ``(F, 5, 3)``."""
    mapping = five_beads(alanine.particles)
    return mapping, mapping.positions(alanine_run[0].positions)


@pytest.fixture
def force_field(bead_frames) -> CoarseGrainedForceField:
    """A small force field with a network that is not trained but does not vanish, double precision."""
    mapping, frames = bead_frames
    prior = fit_prior(mapping.beads, frames, 300.0, PriorConfiguration(torsion_harmonics=2, repulsion=3200.0))
    network = InvariantConfiguration(width=16, depth=2)
    return CoarseGrainedForceField.untrained(prior, network, 300.0, torch.from_numpy(frames)).double().eval()
