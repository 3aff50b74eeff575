"""What works on this machine: packages, OpenMM platforms and backends, compilers, each tried for real."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from ...core.errors import WorkerError
from .probes import PROBES

_KNOWN_PLATFORMS = ("Reference", "CPU", "OpenCL", "CUDA", "HIP")
_PLATFORM_REMEDIES = {
    "CUDA": "pip install 'openmm[cuda12]' or 'openmm[cuda13]', with an NVIDIA driver",
    "HIP": "pip install 'openmm[hip7]', with an AMD driver",
    "OpenCL": "install an OpenCL driver",
}
_BACKEND_REMEDIES = {
    "TorchForce": "optional, slower than PythonForce with a compiled model: pip install torch==2.9.1 openmmtorch==1.5",
    "PythonTorchForce": "optional, in no published openmmtorch yet",
}
_TIME_LIMIT = 300.0  # seconds that a probe may take


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: what kind of thing was tried.
        name: what was tried.
        works: whether it did.
        detail: version and measurement, or the reason why it does not work and what to do.
        required: whether flowbridge cannot do without it.
    """

    section: str
    name: str
    works: bool
    detail: str
    required: bool = False


Outcome = Mapping[str, Any]
"""What a probe found, under ``detail`` in words, or under ``error`` the reason why it failed."""


def examine(*, quick: bool = False, announce: Callable[[str], object] = str) -> Iterator[Finding]:
    """Try everything and yield a finding for each.

    Args:
        quick: leave out compiling with torch, up to a minute, and importing the packages that nothing else here needs: of
            those only the version is read.
        announce: called with what is tried next.
    """
    requirements = _requirements()
    imports = [] if quick else [name for name in requirements if _installed(name)]
    probes = [
        ("learned_potential",),
        *(("import_package", name) for name in imports),
        ("list_platforms",),
        *(("python_force", name) for name in _KNOWN_PLATFORMS),
        ("torch_force",),
        ("python_torch_force",),
        ("cuda_device",),
        ("compile_cpp",),
    ]
    with contextlib.closing(_outcomes(probes)) as outcomes:
        announce("core")
        yield _finding("core", "a potential in torch, OpenMM and ASE", True, next(outcomes))
        announce("packages")
        yield from _packages(requirements, dict(zip(imports, outcomes, strict=False)))
        announce("OpenMM platforms and backends")
        listing = next(outcomes)
        yield from _platforms(listing, dict(zip(_KNOWN_PLATFORMS, outcomes, strict=False)))
        for name, remedy in _BACKEND_REMEDIES.items():
            found = _finding("backends", name, False, next(outcomes))
            yield found if found.works else Finding("backends", name, False, f"{found.detail}; {remedy}")
        announce("devices and compilers")
        yield _finding("devices", "CUDA in torch", False, next(outcomes))
        yield _finding("compilers", "C++ with OpenMP", False, next(outcomes))
    if not quick:
        announce("compilation with torch (up to a minute)")
        yield from (
            _finding("compilers", "torch inductor", False, outcome) for outcome in _outcomes([("compile_torch",)])
        )


def core_works(findings: list[Finding]) -> bool:
    """Return whether everything required works."""
    return all(finding.works for finding in findings if finding.required)


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print one table with a reason wherever something does not work."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("mark")
    table.add_column("name", no_wrap=True)
    table.add_column("detail", overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row("", f"[bold]{section}[/bold]", "")
        mark = "[green]✓[/green]" if finding.works else "[red]✗[/red]" if finding.required else "[yellow]–[/yellow]"
        table.add_row(mark, finding.name, finding.detail.replace("[", r"\["))
    console.print(table)
    broken = [finding.name for finding in findings if finding.required and not finding.works]
    if broken:
        console.print(f"\n[red]The core does not work here: {', '.join(broken)}.[/red]", highlight=False)
    else:
        console.print("\nThe core works here. A dash marks what is optional and not available.", highlight=False)


def findings_as_json(findings: list[Finding]) -> str:
    """Return the findings as JSON: ``{"core_works": bool, "findings": [...]}``."""
    content = {"core_works": core_works(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(content, indent=1)


def _requirements() -> dict[str, tuple[Requirement, bool]]:
    """Return every package that flowbridge depends on, with its declared range and whether it is required."""
    wanted: dict[str, tuple[Requirement, bool]] = {}
    declared = [Requirement(text) for text in requires("flowbridge") or ()]
    for extra in ("", "molecules"):
        for requirement in declared:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted.setdefault(requirement.name, (requirement, not extra))
    return wanted


def _installed(name: str) -> str | None:
    """Return the installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(
    requirements: Mapping[str, tuple[Requirement, bool]], imports: Mapping[str, Outcome]
) -> Iterator[Finding]:
    """Compare versions with the declared ranges, and say which packages could not be imported."""
    yield Finding("packages", "flowbridge", True, f"{version('flowbridge')}, Python {sys.version.split()[0]}", True)
    for name, (requirement, needed) in requirements.items():
        supported = f"supported: {requirement.specifier}"
        installed = _installed(name)
        error = imports.get(name, {}).get("error")
        if installed is None:
            yield Finding("packages", name, False, f"not installed; pip install '{requirement.name}'", needed)
        elif error is not None:
            yield Finding("packages", name, False, f"{installed} cannot be imported: {error}", needed)
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Finding("packages", name, False, f"{installed} is outside what is {supported}", needed)
        else:
            yield Finding("packages", name, True, f"{installed} ({supported})", needed)


def _platforms(listing: Outcome, tried: Mapping[str, Outcome]) -> Iterator[Finding]:
    """Report OpenMM's platforms, the known ones that were tried already and any other."""
    if listing["error"] is not None:
        yield Finding("platforms", "OpenMM", False, str(listing["error"]), True)
        return
    others = [name for name in listing["platforms"] if name not in tried]
    works = []
    for name, outcome in [*tried.items(), *zip(others, _outcomes([("python_force", o) for o in others]), strict=True)]:
        if name in listing["platforms"]:
            found = _finding("platforms", name, name == "Reference", outcome)
            works += [name] if found.works else []
            yield found
        else:
            failures = [text for text in listing["failures"] if f"OpenMM{name}." in text]
            reason = failures[0].rpartition("/")[2] if failures else "no plugin for it is installed"
            yield Finding("platforms", name, False, f"{reason}; {_PLATFORM_REMEDIES.get(name, '')}".rstrip("; "))
    detail = f"on {', '.join(works)}; what flowbridge uses" if works else "on no platform"
    yield Finding("backends", "PythonForce", bool(works), detail, True)


def _finding(section: str, name: str, required: bool, outcome: Outcome) -> Finding:
    error = outcome["error"]
    return Finding(section, name, error is None, str(error or outcome.get("detail", "")), required)


def _outcomes(probes: Sequence[tuple[str, ...]]) -> Generator[Outcome, None, None]:
    """Run probes, each a name and arguments, and yield what each finds.

    One process runs them all, since most of their time goes into imports. Where a probe takes its process down, that is its
    outcome, and another process goes on with the rest.
    """
    unknown = [name for name, *_ in probes if name not in PROBES]
    if unknown:
        raise ValueError(f"there is no probe {unknown[0]!r}; known are {', '.join(PROBES)}")
    done = 0
    while done < len(probes):
        first = done
        for outcome in _outcomes_of_process(probes[first:]):
            done += 1
            yield outcome


def _outcomes_of_process(probes: Sequence[tuple[str, ...]]) -> Iterator[Outcome]:
    """Yield outcomes up to the end of the process; the last says how it ended, if that was too early."""
    command = [sys.executable, "-m", f"{__package__}.probes", str(_TIME_LIMIT), *map(json.dumps, probes)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace"
        ) as process,
    ):
        if process.stdout is None:
            raise WorkerError("the process that tries everything has no output to read")
        count = 0
        try:
            for line in process.stdout:
                outcome = _parsed(line)
                if "error" in outcome:
                    count += 1
                    yield outcome
        finally:
            if count < len(probes):
                process.terminate()  # where nobody asks for the rest; one that ended by itself does not notice
        if count < len(probes):
            stderr.seek(0)
            yield {"error": _ending(process.wait(), stderr.read().strip())}


def _ending(code: int, said: str) -> str:
    """Return how a process ended that had not tried everything."""
    if "Timeout (" in said:  # of faulthandler, which watches over each probe
        return f"no answer within {_TIME_LIMIT:.0f} s"
    if code < 0:
        return f"the process that tried it was killed by signal {-code}"
    return (said.splitlines() or ["no message"])[-1]


def _parsed(line: str) -> dict[str, Any]:
    # Libraries may print lines of their own, and a killed process half a line.
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
