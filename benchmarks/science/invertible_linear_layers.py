"""Invertible linear layers by perturbations of rank one (P4, arXiv 2010.07033): accuracy, cost, regression, mixing of modes.

python -m benchmarks.science.invertible_linear_layers accuracy|cost|regression|modes|alanine [--small]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from flowbridge.core.execution.progress import track
from flowbridge.core.training.checkpoints import read_checkpoint, write_checkpoint
from flowbridge.flows.transforms.merging import MergingSchedule
from flowbridge.flows.transforms.rank_one_matrix import MergeLimits, RankOneMatrix

from ..harness import done_once, paired, ratio, report, study
from .linear_parametrisations import PARAMETRISATIONS, LinearModel, training_step
from .mode_mixing import compare_on_alanine, compare_on_modes


def accuracy(output: Path, updates: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Make random updates, as an optimiser would, and compare inverse and determinant with direct ones 20 times on the way."""
    results, rows = {}, []
    for size in sizes:
        file = output / f"accuracy-{updates}-{size}.json"
        found = done_once(file, lambda n=size, f=file: _random_walk(n, updates, f.with_suffix(".checkpoint")))
        results[str(size)] = found
        numbers = [f"{found[name]:.1e}" for name in ("inverse", "residual", "log_det", "condition")]
        rows.append([str(size), *numbers, str(found["merges"]), str(found["held_back"])])
    columns = ["n", "inverse, relative", "|A X - 1|", "log det", "condition", "merges", "held back"]
    title = f"{updates} updates, float64: largest errors"
    report("invertible_linear_accuracy", title, columns, rows, results, small=updates < 100_000)
    return results


def _random_walk(size: int, updates: int, checkpoint: Path) -> dict[str, Any]:
    """Return the largest errors; what is interrupted goes on from its checkpoint."""
    matrix = RankOneMatrix(size, seed=1, dtype=torch.float64)
    optimiser = torch.optim.SGD([matrix.u], lr=1.0)
    schedule = MergingSchedule(matrix, optimiser, every=1)
    worst = {"inverse": 0.0, "log_det": 0.0, "residual": 0.0, "condition": 0.0}
    begin = 0
    if checkpoint.is_file():
        progress = read_checkpoint(checkpoint)
        matrix.load_state_dict(progress["matrix"])
        schedule.load_state_dict(progress["schedule"])
        begin, worst = progress["updates"], progress["worst"]
    for number in track(range(begin + 1, updates + 1), f"n = {size}", updates - begin):
        generator = torch.Generator().manual_seed(number)
        matrix.u.grad = 0.05 / math.sqrt(size) * torch.randn(size, generator=generator, dtype=torch.float64)
        optimiser.step()
        if number % max(updates // 20, 1) == 0:
            _compare(matrix, worst)
            state = {"updates": number, "worst": worst, "schedule": schedule.state_dict()}
            write_checkpoint(checkpoint, {**state, "matrix": matrix.state_dict()})
    checkpoint.unlink()
    return {**worst, "merges": int(matrix.merges), "held_back": schedule.held_back}


def _compare(matrix: RankOneMatrix, worst: dict[str, float]) -> None:
    direct = torch.linalg.inv(matrix.matrix)
    sign, log_det = torch.linalg.slogdet(matrix.matrix)
    if int(sign) != matrix.sign():
        raise RuntimeError("the tracked sign of the determinant is wrong")
    residual = matrix.matrix @ matrix.inverse - torch.eye(matrix.size, dtype=torch.float64)
    found = {
        "inverse": float((matrix.inverse - direct).abs().max() / direct.abs().max()),
        "residual": float(residual.abs().max()),
        "log_det": abs(float(matrix.log_det - log_det)),
        "condition": float(torch.linalg.cond(matrix.matrix)),
    }
    for name, value in found.items():
        worst[name] = max(worst[name], value)


def cost(sizes: tuple[int, ...], rounds: int, *, small: bool) -> dict[str, Any]:
    """Time training steps of a linear flow: loss, gradient, Adam; merges and corrections at their share."""
    medians: dict[str, list[float]] = {name: [] for name in PARAMETRISATIONS}
    gains: list[float] = []
    cycle = 50 if small else 500  # of merges and corrections of the inverse, so that both have their share
    for size in track(sizes, "cost", len(sizes)):
        steps = {name: training_step(make(size)) for name, make in PARAMETRISATIONS.items()}
        cases = {name: step for name, step in steps.items() if name != "P4"}
        cases["P4"] = lambda step=steps["P4"]: [step() for _ in range(cycle)]
        timings = paired(cases, work={"P4": cycle}, rounds=rounds, seconds=0.02 if small else 0.1)
        for name in PARAMETRISATIONS:
            medians[name].append(timings[name].median)
        gains.append(ratio(timings["dense"], timings["P4"]))
    rows = [[name, *(f"{value:.0f}" for value in values), _exponent(sizes, values)] for name, values in medians.items()]
    rows.append(["dense over P4", *(f"{value:.2f}" for value in gains), ""])
    columns = ["microseconds a step", *(f"n = {size}" for size in sizes), "exponent"]
    results = {"sizes": list(sizes), "microseconds": medians, "dense_over_p4": gains}
    title = "Training step of a linear flow, batch 32, float32"
    report("invertible_linear_cost", title, columns, rows, results, small=small)
    return results


def _exponent(sizes: tuple[int, ...], values: list[float]) -> str:
    """Return the exponent of the time between the largest size and the one two before it."""
    first = max(len(sizes) - 3, 0)
    return f"{math.log(values[-1] / values[first]) / math.log(sizes[-1] / sizes[first]):.2f}"


def regression(size: int, steps: int) -> dict[str, Any]:
    """Regress onto random matrices of either sign, from identities of either sign; return relative errors.

    Singular values of the targets lie between 0.7 and 1.3: a matrix of the other sign cannot come nearer than the smallest.
    """
    results, rows = {}, []
    for sign in (1, -1):
        generator = torch.Generator().manual_seed(3)
        turns = [torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in "ab"]
        target = turns[0] @ torch.diag(torch.linspace(0.7, 1.3, size, dtype=torch.float64)) @ turns[1]
        target[0] *= sign * float(torch.linalg.det(target).sign())
        for name in ("P4, det > 0", "P4, det < 0", "LU", "dense"):
            model = _regression_model(name, size)
            error = _fit(model, target, steps)
            found = int(torch.linalg.det(model.dense()).sign())
            results[f"{sign} {name}"] = error
            rows.append([f"{'+' if sign > 0 else '-'}", name, f"{error:.1e}", f"{found:+d}"])
    columns = ["det of the target", "layer", "error", "det of the layer"]
    title = f"Regression, n = {size}, {steps} steps"
    report("invertible_linear_regression", title, columns, rows, results, small=steps < 1000)
    return results


def _regression_model(name: str, size: int) -> LinearModel:
    if not name.startswith("P4"):
        return PARAMETRISATIONS[name](size).double()
    start = torch.eye(size, dtype=torch.float64)
    start[0, 0] = 1.0 if ">" in name else -1.0
    return PARAMETRISATIONS["P4"](size, start).double()


def _fit(model: LinearModel, target: torch.Tensor, steps: int) -> float:
    """Minimise the squared error with Adam, the rate falling to zero; return ``|W - T| / |T|``."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    matrices = [part for part in model.modules() if isinstance(part, RankOneMatrix)]
    if matrices:
        MergingSchedule(model, optimiser, every=5, limits=MergeLimits(log_det=(-3.0 * model.size, 3.0 * model.size)))
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        x = torch.randn(64, model.size, generator=generator, dtype=torch.float64)
        optimiser.zero_grad()
        (model(x) - x @ target.T).square().sum(-1).mean().backward()
        optimiser.step()
        rate.step()
    with torch.no_grad():
        return float(torch.linalg.norm(model.dense() - target) / torch.linalg.norm(target))


def main() -> None:
    """Run from the command line."""
    parser = study(__doc__, "runs/invertible_linear")
    parser.add_argument("part", choices=["accuracy", "cost", "regression", "modes", "alanine"])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind on the modes")
    parser.add_argument(
        "--frames", type=Path, default=Path("runs/stochastic_flows/alanine"), help="of alanine dipeptide"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 101, 512], help="for accuracy")
    options = parser.parse_args()
    small = options.small
    torch.set_num_threads(1)
    if options.part == "accuracy":
        accuracy(options.output, 200 if small else 100_000, (8, 16) if small else tuple(options.sizes))
    elif options.part == "cost":
        cost((16, 32) if small else (32, 64, 128, 256, 512, 1024), 2 if small else 3, small=small)
    elif options.part == "regression":
        regression(4 if small else 16, 50 if small else 4000)
    elif options.part == "modes":
        compare_on_modes(options.output, seeds=1 if small else options.seeds, steps=30 if small else 2000)
    else:
        compare_on_alanine(options.output, options.frames, small=small)


if __name__ == "__main__":
    main()
