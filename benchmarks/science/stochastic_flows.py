"""Stochastic normalizing flows on the systems of their paper (arXiv 2002.06707).

    python -m benchmarks.science.stochastic_flows double_well|alanine|images [--small]

Free energies of the double well over ``--seeds`` trainings; torsions of alanine dipeptide at 1000 K; densities from images.
What is done is kept in ``--output`` and not done again.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowbridge.core.execution.progress import track
from flowbridge.flows.stochastic.training import PathStage, train_paths

from ..harness import done_once, mean_and_deviation, report, study
from .alanine_paths import PUBLISHED, compare_on_alanine
from .double_well import KINDS, brute_force_data, evaluate, make_flow
from .image_densities import SHAPES, draw_image_densities

_PUBLISHED = {
    "NSF": ("1.31 ± .25", "2.24 ± .47"),
    "NSF + MC": (".70 ± .21", ".60 ± .16"),
    "RNVP": ("1.44 ± .53", "1.15 ± .41"),
    "RNVP + MC": ("1.51 ± .19", ".63 ± .11"),
    "RNVP + MC, learned step": ("-", "-"),
}
_STEPS, _BATCH, _LEARNING_RATE = 300, 128, 5e-3


def double_well(output: Path, seeds: int, kinds: tuple[str, ...], *, small: bool) -> dict[str, Any]:
    """Train and evaluate; print the table; return its numbers by kind."""
    jobs = [(kind, seed) for kind in kinds for seed in range(seeds)]
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind, seed in track(jobs, "double well", len(jobs)):
        file = output / f"{kind}-{seed}.json".replace(" ", "").replace(",", "-")
        checkpoint = file.with_suffix(".checkpoint")
        results[kind].append(
            done_once(file, lambda k=kind, s=seed, c=checkpoint: _double_well_run(k, s, c, small=small))
        )
    rows = []
    for kind in kinds:
        runs = results[kind]
        parts = [mean_and_deviation([run[which]["total"] for run in runs], 2) for which in ("plain", "reweighted")]
        percent = statistics.mean(run["effective_sample_percent"] for run in runs)
        rows.append([kind, *parts, *_PUBLISHED[kind], f"{percent:.0f}", str(sum(run["empty"] for run in runs))])
    columns = ["flow", "error", "reweighted", "paper", "reweighted", "ESS %", "empty"]
    title = f"Double well, {seeds} trainings: error of the free energy, kT"
    report("stochastic_flows_double_well", title, columns, rows, {"runs": results}, small=small)
    return results


def _double_well_run(kind: str, seed: int, checkpoint: Path, *, small: bool) -> dict[str, Any]:
    begin = time.monotonic()
    data, flow = brute_force_data(seed), make_flow(kind, seed)
    steps, batch = (3, 16) if small else (_STEPS, _BATCH)
    stages = [
        PathStage(steps, batch, _LEARNING_RATE),
        PathStage(steps, batch, _LEARNING_RATE, likelihood_weight=0.5, kullback_leibler_weight=0.5),
    ]
    losses = train_paths(flow, data, stages, seed, checkpoint=checkpoint)
    trained = time.monotonic()
    evaluation = evaluate(flow, seed, *((2, 2000) if small else (20, 100_000)))
    seconds = {"training": trained - begin, "evaluation": time.monotonic() - trained}
    errors = {"plain": evaluation.plain._asdict(), "reweighted": evaluation.reweighted._asdict()}
    return {**asdict(evaluation), "final_loss": losses[-1], "seconds": seconds, **errors}


def alanine(output: Path, *, small: bool) -> dict[str, Any]:
    """Compare couplings with and without kernels on alanine dipeptide at 1000 K; print the table; return its numbers."""
    results = compare_on_alanine(output, small=small)
    rows = []
    for torsion, published in PUBLISHED.items():
        plain, mixed = (results[name]["divergences"][torsion] for name in ("RNVP", "RNVP + MC"))
        numbers = (plain, mixed, results["dynamics"][torsion], *published)
        rows.append([torsion, *(f"{value:.3f}" for value in numbers), f"{plain / mixed:.1f}"])
    columns = ["torsion", "RNVP", "RNVP + MC", "dynamics", "paper", "paper + MC", "factor"]
    title = "Alanine dipeptide, 1000 K: KL of torsions"
    report("stochastic_flows_alanine", title, columns, rows, results, small=small)
    for kind in ("RNVP", "RNVP + MC"):
        print(f"{kind}: effective samples {results[kind]['effective_sample_percent']:.2f} %")
    return results


def images(output: Path, shapes: tuple[str, ...], *, small: bool) -> dict[str, Any]:
    """Train spline flows with and without kernels on densities of images and draw them; return the numbers."""
    results = draw_image_densities(output, shapes, small=small)
    rows = [
        [shape, kind, f"{values['divergence']:.3f}", f"{values['background']:.3f}", f"{values['seconds']:.0f}"]
        for shape, kinds in results.items()
        for kind, values in kinds.items()
    ]
    columns = ["image", "flow", "KL", "off the figure", "s"]
    report("stochastic_flows_images", "Densities of images", columns, rows, results, small=small)
    return results


def main() -> None:
    """Run from the command line."""
    parser = study(__doc__, "runs/stochastic_flows")
    parser.add_argument("system", choices=["double_well", "alanine", "images"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.output / (options.system + ("_small" if options.small else ""))
    if options.system == "double_well":
        double_well(folder, options.seeds, tuple(options.kinds), small=options.small)
    elif options.system == "alanine":
        alanine(folder, small=options.small)
    else:
        images(folder, tuple(options.shapes), small=options.small)


if __name__ == "__main__":
    main()
