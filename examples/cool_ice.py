"""Ice XI cooled from 250 K to 100 K without simulating at 100 K: samples with weights, a free energy, a figure.

    python examples/cool_ice.py [FRAMES] [TRAINING_STEPS]

Sixteen molecules of rigid TIP4P-Ew water are simulated at 250 K. A map of rigid bodies, which starts as the harmonic
contraction of the crystal and is trained if steps are given, carries the frames to 100 K and weights them for it. A short
simulation at 100 K is run for comparison only. Needs GenIce2: pip install 'flowbridge[flow-families]'.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import openmm
import torch

from flowbridge.core.samples import WeightedSamples
from flowbridge.core.statistics.targeted_free_energy import targeted_free_energy
from flowbridge.core.units import thermal_energy
from flowbridge.flows.rigid.configuration import RigidFlowConfiguration, RigidFlowTraining
from flowbridge.flows.rigid.crystal import at_rest
from flowbridge.flows.rigid.energies import BodyEnergy
from flowbridge.flows.rigid.relaxation import relaxed
from flowbridge.flows.rigid.temperature_map import RigidBodyMap
from flowbridge.flows.rigid.training import train_by_work
from flowbridge.integrations.genice import ice_structure
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_langevin
from flowbridge.integrations.openmm.systems.rigid_water import RigidSystemEnergy, RigidWater, rigid_water
from flowbridge.workflows.figure_style import MD, REFERENCE, REWEIGHTED, drawn

WARM, COLD = 250.0, 100.0


def simulated(ice: RigidWater, places: np.ndarray, temperature: float, frames: int) -> WeightedSamples:
    """Return frames of Langevin dynamics."""
    run = LangevinRun(
        openmm.XmlSerializer.serialize(ice.system), places, temperature, step_ps=0.002, friction=2.0,
        equilibration_steps=20 * 50, frame_interval=50, frames=frames, seed=1, file=Path("unused.npz"), platform="CPU",
    )  # fmt: skip
    trajectory = run_langevin(run)
    reduced = trajectory.energies / thermal_energy(temperature)
    return WeightedSamples(trajectory.positions, np.zeros(frames), ice.particles, temperature, {"target": reduced})


def draw(file: Path, warm: WeightedSamples, cooled: WeightedSamples, cold: WeightedSamples, box: np.ndarray) -> None:
    """Draw where the atoms are, and how the energy is distributed."""
    with drawn(file, 3.9) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.0, 1.0, 1.1))
        for axes, samples, title in (
            (left, warm, f"simulated at {WARM:g} K"),
            (middle, cooled.resample(len(warm), seed=1), f"carried to {COLD:g} K, resampled"),
        ):
            shown = samples.positions[:: max(1, len(samples) // 150)].reshape(-1, 16, 4, 3)[..., [0, 2]]
            shown = shown - np.floor(warm.positions[0].reshape(16, 4, 3)[:, :1, [0, 2]] / box[[0, 2]]) * box[[0, 2]]
            for sites, colour, size, atom in (((1, 2), MD, 1.5, "H"), ((0,), REWEIGHTED, 2.5, "O")):
                points = shown[:, :, list(sites)].reshape(-1, 2)
                axes.plot(*points.T, ".", color=colour, markersize=size, markeredgewidth=0, alpha=0.5)
                axes.plot([], [], "o", color=colour, markersize=5, markeredgewidth=0, label=atom)
            axes.set(title=title, xlabel="x (nm)", ylabel="z (nm)", aspect="equal")
            axes.set(xlim=(-0.1, box[0] + 0.1), ylim=(-0.15, box[2] + 0.22))
        left.legend(loc="upper center", ncols=2)
        for samples, colour, label in (
            (warm, MD, f"simulated, {WARM:g} K"),
            (cold, REFERENCE, f"simulated, {COLD:g} K"),
            (cooled, REWEIGHTED, f"carried and weighted, {COLD:g} K"),
        ):
            energy = samples.reduced_potentials["target"] * thermal_energy(samples.temperature) / 16
            edges = np.linspace(*np.quantile(energy, (0.001, 0.999)), 19)
            right.hist(energy, edges, weights=samples.weights, density=True, histtype="step", color=colour, label=label)
        right.set(title="energy", xlabel="kJ/mol a molecule", yticks=[], box_aspect=0.87)
        right.spines["left"].set_visible(False)
        right.set_ylim(0, right.get_ylim()[1] * 1.5)
        right.legend(loc="upper right")


def main(frames: int = 1000, steps: int = 0, figure: Path = Path("cooled_ice.png")) -> tuple[float, float, float]:
    """Simulate, carry, print; return the effective sample size in percent, the free-energy difference in kT and its error."""
    torch.set_num_threads(1)
    ice = rigid_water(ice_structure("XI"), method="Ewald")
    exact = BodyEnergy(ice.bodies, RigidSystemEnergy(ice.system, "Reference", workers=1))
    crystal, minimum, _ = relaxed(exact, ice.configuration, torch.from_numpy(ice.box))
    print(f"{len(ice.bodies.template)} sites a molecule, minimum of the energy {minimum / 16:.3f} kJ/mol a molecule")

    places = ice.bodies.places(crystal.configuration(at_rest(16)))[0].numpy()
    warm, cold = (simulated(ice, places, temperature, frames) for temperature in (WARM, COLD))

    energy = RigidSystemEnergy(ice.system, "CPU", workers=1)
    design = RigidFlowConfiguration(repetitions=4 if steps else 0, closed="forward")
    model = RigidBodyMap.untrained(ice.bodies, crystal, warm, COLD, design)
    if steps:
        settings = RigidFlowTraining(steps=steps, checkpoint_interval=max(1, steps // 10))
        data = model.frames(warm, energy)
        with tempfile.TemporaryDirectory() as folder:
            cut = frames * 4 // 5
            target = model.ensemble(energy)
            train_by_work(model.flow, data[:cut].draw, target, settings, Path(folder), seed=1, held_out=data[cut:])
    cooled = model.weighted_samples(warm, energy)
    found = targeted_free_energy(warm, cold, energy, energy, model.configuration_map()).difference
    one_sided = -float(np.logaddexp.reduce(cooled.log_weights) - np.log(frames))
    print(f"effective sample size at {COLD:g} K: {cooled.effective_sample_percent():.1f} %")
    print(f"F({COLD:g} K) - F({WARM:g} K) = {one_sided / 16:.4f} kT a molecule from {WARM:g} K alone,")
    print(f"  {found.value / 16:.4f} +- {found.error / 16:.4f} with the simulation at {COLD:g} K as well")
    draw(figure, warm, cooled, cold, ice.box)
    print(f"figure: {figure}")
    return cooled.effective_sample_percent(), found.value, found.error


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
