"""The cost of privacy, and audits of ledgers: ``python -m benchmarks.science.private_training``.

    python -m benchmarks.science.private_training digits|autoencoder|mnist|alanine|speed|audit [--small] [--minutes M]

``digits`` and ``mnist``: test accuracy against epsilon for DP-MAC, DP-SGD and no privacy (``mnist`` takes a local copy,
``--mnist FOLDER``); ``autoencoder``: reconstruction error; ``alanine``: errors of the forces and the free-energy surface of a
coarse-grained force field of capped alanine, with a figure; ``speed``: seconds an epoch, in turns with opacus' own engine;
``audit``: lower bounds from canaries in many audits of the real mechanism and of broken ones. Every run is kept in
``--output`` and not done again; ``--minutes`` stops in time, and the same command goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ..harness import OutOfTime, study
from .coarse_graining import FOLDER as COARSE_GRAINING
from .private_alanine import alanine
from .private_audits import audit
from .private_images import EPSILONS, utility
from .private_speed import speed

_PARTS = ("digits", "autoencoder", "alanine", "speed", "audit")


def run(part: str, arguments: argparse.Namespace, folder: Path, deadline: float) -> None:
    """Do one part, or what there is time for."""
    small = arguments.small
    seeds = 1 if small else arguments.seeds
    if part == "speed":
        speed(2 if small else 9, small=small)
    elif part == "audit":
        count, trainings = (1, 20) if small else (arguments.audits, arguments.trainings)
        audit(folder / "audit", count, trainings, deadline, small=small)
    elif part == "alanine":
        reference = arguments.reference or (folder / "reference" if small else COARSE_GRAINING / "alanine")
        alanine(folder / "alanine", reference, seeds, deadline, small=small)
    else:
        epsilons = (1.0,) if small else tuple(arguments.epsilons)
        mnist = arguments.mnist if part == "mnist" else None
        utility(part, folder / part, seeds, epsilons, deadline, small=small, mnist=mnist)


def main(words: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = study(__doc__, "runs/benchmarks/private_training")
    parser.add_argument("part", nargs="?", choices=[*_PARTS, "mnist"], help="default: all but mnist")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--audits", type=int, default=100)
    parser.add_argument("--trainings", type=int, default=40)
    parser.add_argument("--mnist", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--reference", type=Path, help="folder of the coarse-graining benchmark of alanine")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args(words)
    if arguments.part == "mnist" and arguments.mnist is None:
        parser.error("mnist takes --mnist FOLDER: a local copy is not downloaded")
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60.0 * arguments.minutes
    folder = arguments.output / ("small" if arguments.small else "full")
    try:
        for part in [arguments.part] if arguments.part else _PARTS:
            run(part, arguments, folder, deadline)
    except OutOfTime:
        print(f"{arguments.minutes:g} minutes are over: the same command continues from {folder}")


if __name__ == "__main__":
    main()
