"""The command ``flowbridge run``."""

from __future__ import annotations

from .options import ConfigurationFile, Debug, Output, Scheduler, Skip, Until, Workers, end, readable_errors, selection


def run(
    config: ConfigurationFile,
    output: Output = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    until: Until = None,
    skip: Skip = None,
    debug: Debug = False,
) -> None:
    """Train a flow on a molecule, reweight, and write a report.

    Simulates the molecule for training data, and runs dynamics of the flow in OpenMM and ASE at the end.

    Finished stages are kept: after an interruption the same command continues. Stages: simulate (or trajectory), train,
    comparison, reweight, averages, dynamics, compare.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann.pipeline import run_workflow_file

        end(run_workflow_file(config, output, workers, scheduler, selection(until, skip)))
