"""What works on this machine: packages, OpenMM platforms and backends, compilers, each tried for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

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
_TIME_LIMIT = 300.0


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


def examine(*, compilation: bool = True, announce: Callable[[str], object] = str) -> Iterator[Finding]:
    """Try everything and yield a finding for each.

    Args:
        compilation: whether to compile with torch, which takes up to a minute.
        announce: called with what is tried next.
    """
    announce("core")
    yield _finding("core", "a potential in torch, OpenMM and ASE", True, "learned_potential")
    announce("packages")
    yield from _packages()
    announce("OpenMM platforms and backends")
    with ThreadPoolExecutor(2) as pool:  # each probe is a process that mostly imports
        yield from _platforms(pool)
        forces = [
            pool.submit(_finding, "backends", name, False, probe)
            for name, probe in (("TorchForce", "torch_force"), ("PythonTorchForce", "python_torch_force"))
        ]
        for force in forces:
            found = force.result()
            remedy = _BACKEND_REMEDIES[found.name]
            yield Finding(
                "backends", found.name, found.works, found.detail if found.works else f"{found.detail}; {remedy}"
            )
    announce("devices and compilers")
    yield _finding("devices", "CUDA in torch", False, "cuda_device")
    yield _finding("compilers", "C++ with OpenMP", False, "compile_cpp")
    if compilation:
        announce("compilation with torch (up to a minute)")
        yield _finding("compilers", "torch inductor", False, "compile_torch")


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


def _packages() -> Iterator[Finding]:
    """Import every package that flowbridge depends on and compare versions with the declared ranges."""
    requirements = [Requirement(text) for text in requires("flowbridge") or ()]
    required = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    optional = {r.name: r for r in requirements if r.marker and r.marker.evaluate({"extra": "molecules"})}
    wanted = {**required, **{name: r for name, r in optional.items() if name not in required}}
    errors = _import_errors(list(wanted))
    yield Finding("packages", "flowbridge", True, f"{version('flowbridge')}, Python {sys.version.split()[0]}", True)
    for name, requirement in wanted.items():
        needed = name in required
        supported = f"supported: {requirement.specifier}"
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Finding("packages", name, False, f"not installed; pip install '{requirement.name}'", needed)
            continue
        error = errors[name]
        if error is not None:
            yield Finding("packages", name, False, f"{installed} cannot be imported: {error}", needed)
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Finding("packages", name, False, f"{installed} is outside what is {supported}", needed)
        else:
            yield Finding("packages", name, True, f"{installed} ({supported})", needed)


def _import_errors(names: list[str]) -> dict[str, str | None]:
    """Return for each package why it cannot be imported, or None; survives packages that crash Python."""
    errors: dict[str, str | None] = {}
    while remaining := [name for name in names if name not in errors]:
        lines, ending = _run("import_packages", *remaining)
        for line in lines:
            if "name" in line:
                errors[line["name"]] = line["error"]
        if not any(name in errors for name in remaining) or ending is not None:
            started = [line["starting"] for line in lines if "starting" in line]
            errors[started[-1] if started else remaining[0]] = ending or "its import ended without a result"
    return errors


def _platforms(pool: ThreadPoolExecutor) -> Iterator[Finding]:
    lines, ending = _run("list_platforms")
    listing: dict[str, Any] = lines[-1] if lines else {"error": ending}
    if listing.get("error"):
        yield Finding("platforms", "OpenMM", False, str(listing["error"]), True)
        return
    registered: list[str] = listing["platforms"]
    names = [*_KNOWN_PLATFORMS, *(name for name in registered if name not in _KNOWN_PLATFORMS)]
    tries = {
        name: pool.submit(_finding, "platforms", name, name == "Reference", "python_force", name)
        for name in names
        if name in registered
    }
    works = []
    for name in names:
        if name in tries:
            found = tries[name].result()
            works += [name] if found.works else []
            yield found
        else:
            failures = [text for text in listing["failures"] if f"OpenMM{name}." in text]
            reason = failures[0].rpartition("/")[2] if failures else "no plugin for it is installed"
            yield Finding("platforms", name, False, f"{reason}; {_PLATFORM_REMEDIES.get(name, '')}".rstrip("; "))
    detail = f"on {', '.join(works)}; what flowbridge uses" if works else "on no platform"
    yield Finding("backends", "PythonForce", bool(works), detail, True)


def _finding(section: str, name: str, required: bool, probe: str, *arguments: str) -> Finding:
    lines, ending = _run(probe, *arguments)
    if ending is not None or not lines:
        return Finding(section, name, False, ending or "no result", required)
    error = lines[-1].get("error")
    return Finding(section, name, error is None, str(error or lines[-1].get("detail", "")), required)


def _run(probe: str, *arguments: str) -> tuple[list[dict[str, Any]], str | None]:
    """Run a probe in its own process; return its JSON lines and, when it did not end well, how it ended."""
    if probe not in PROBES:
        raise ValueError(f"there is no probe {probe!r}; known are {', '.join(PROBES)}")
    command = [sys.executable, "-m", f"{__package__}.probes", probe, *arguments]
    ending = None
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIME_LIMIT,
            stdin=subprocess.DEVNULL,
        )
        output = done.stdout
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            killed = f"the process that tried it was killed by signal {-done.returncode}"
            ending = killed if done.returncode < 0 else last
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"no answer within {_TIME_LIMIT:.0f} s"
    lines = [_parsed(line) for line in output.splitlines() if line.startswith("{")]
    return [line for line in lines if line], ending


def _parsed(line: str) -> dict[str, Any]:
    # Libraries may print lines of their own, and a killed process half a line.
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
