"""The command ``flowbridge reference``."""

from __future__ import annotations

from .options import ConfigurationFile, Debug, Workers, readable_errors


def reference(config: ConfigurationFile, workers: Workers = None, debug: Debug = False) -> None:
    """Compute the reference free energy of a workflow (long).

    Stores it next to CONFIG.toml, in place of the one that is there.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.boltzmann.reference import compute_reference

        compute_reference(config, workers)
