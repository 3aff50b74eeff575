"""The command ``flowbridge doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AsJSON, Debug, readable_errors


def doctor(
    json: AsJSON = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out compiling with torch and importing each package.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what works on this machine, and why the rest does not.

    Tries packages, OpenMM's platforms, backends and compilers.

    The exit code is 0 when everything that flowbridge cannot do without works.
    """
    with readable_errors(debug):
        from rich.console import Console

        from ..workflows.diagnostics.doctor import core_works, examine, findings_as_json, print_findings

        stderr = Console(stderr=True)
        with stderr.status("trying") as status:
            findings = list(examine(quick=quick, announce=lambda what: status.update(f"trying {what}")))
        if json:
            typer.echo(findings_as_json(findings))
        else:
            print_findings(findings, Console())
        if not core_works(findings):
            raise typer.Exit(1)
