"""Efficiency of work that is spread over worker processes of a Dask cluster: ``python -m benchmarks.distributed``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import distributed
import openmm
import torch

from flowbridge.integrations.dask import DaskExecutor
from flowbridge.integrations.openmm.energies.batched import OpenMMEnergy
from flowbridge.integrations.openmm.energies.distributed import DistributedEnergy
from flowbridge.integrations.openmm.sampling.dynamics import LangevinRun, run_all, run_langevin

from .harness import arguments, paired, ratio, report
from .molecules import alanine_flow, alanine_frames, alanine_system, alanine_topology

_RUNS, _FRAMES, _INTERVAL = 4, 25, 200  # simulations of 5000 steps each


def main() -> None:
    """Time simulations, energies and samples alone and on clusters of 1, 2 ... workers."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(rounds=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="sizes of the clusters")
    parser.add_argument("--count", type=int, default=50_000, help="configurations of a batch, and samples")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, results = [], {"count": options.count}
    for workers in options.workers:
        with (
            distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
            tempfile.TemporaryDirectory() as folder,
        ):
            times = paired(
                _cases(DaskExecutor(client), options.count, Path(folder)), rounds=options.rounds, seconds=0.0
            )
        for work in ("simulations", "energies", "samples"):
            alone, there = times[f"{work} alone"], times[work]
            speedup = ratio(alone, there)
            seconds = [timing.median * 1e-6 for timing in (alone, there)]
            results[f"{work}_{workers}"] = {
                "speedup": speedup, "efficiency": speedup / workers, "seconds_alone": seconds[0], "seconds": seconds[1]
            }  # fmt: skip
            numbers = [f"{x:.2f}" for x in (*seconds, speedup)]
            rows.append([work, f"{workers}", *numbers, f"{100 * speedup / workers:.0f} %"])
    report(
        "distributed",
        f"work on Dask workers: {_RUNS} simulations of {_FRAMES * _INTERVAL:,} steps, {options.count:,} energies and samples",
        ["", "workers", "seconds alone", "seconds", "speed-up", "efficiency"],
        rows,
        results,
    )


def _cases(executor: DaskExecutor, count: int, folder: Path) -> dict[str, Callable[[], object]]:
    system, (_, positions) = alanine_system(), alanine_topology()
    xml = openmm.XmlSerializer.serialize(system)
    runs = [
        LangevinRun(xml, positions, 300.0, 0.001, 2.0, 100, _INTERVAL, _FRAMES, seed, folder / f"{seed}.npz")
        for seed in range(1, _RUNS + 1)
    ]
    frames = alanine_frames()[torch.arange(count).numpy() % 1000]
    flow = alanine_flow()
    alone, there = OpenMMEnergy(system, "Reference", workers=1), DistributedEnergy(system, executor, "Reference")

    def simulated() -> None:
        for run in runs:
            run.file.unlink(missing_ok=True)
        list(run_all(runs, executor))

    def drawn(where: DaskExecutor | None) -> object:
        return flow.sample_positions(count, torch.Generator().manual_seed(1), where)

    return {
        "simulations alone": lambda: [run_langevin(run) for run in runs],
        "simulations": simulated,
        "energies alone": lambda: alone.energies_and_forces(frames),
        "energies": lambda: there.energies_and_forces(frames),
        "samples alone": lambda: drawn(None),
        "samples": lambda: drawn(executor),
    }


if __name__ == "__main__":
    main()
