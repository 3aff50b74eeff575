"""The shell of every report: one HTML file that holds its figures and loads nothing."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

from .stages import Row, flattened, write_text

_PACKAGES = ("flowbridge", "torch", "openmm", "ase", "mdtraj", "numpy", "scipy", "matplotlib")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class Check:
    """One requirement: the key in ``results.json``, what is asked, what was measured, and whether that is enough."""

    key: str
    required: str
    measured: str
    met: bool
    note: str = ""


@dataclass(frozen=True)
class StageEntry:
    """A stage in the table at the end and in the report; ``seconds`` is None, with the problem, where it is not done."""

    name: str
    title: str
    seconds: float | None
    rows: tuple[Row, ...]
    problem: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture (PNG) with its heading and caption."""

    title: str
    caption: str
    file: Path


@dataclass(frozen=True)
class Page:
    """What a pipeline adds to the shell.

    Attributes:
        title: heading of the page.
        lead: a sentence below it.
        figures: shown in order, each under its title; for pages without a template of their own.
        template: file in this package that extends ``report.html``, where the page has more than figures.
        context: variables of the template; files of pictures are turned to their data by the filter ``inlined``.
        use: lines of code that show how results are used.
        hidden: keys of the results that the list of all numbers leaves out.
    """

    title: str
    lead: str
    figures: Sequence[Figure] = ()
    template: str = "report.html"
    context: Mapping[str, Any] = field(default_factory=dict)
    use: Sequence[str] = ()
    hidden: tuple[str, ...] = ()


def write_report(
    file: Path, page: Page, results: Mapping[str, Any], stages: Sequence[StageEntry], checks: Sequence[Check]
) -> None:
    """Write a report.

    Args:
        file: HTML file to write.
        page: what the pipeline adds.
        results: what ``results.json`` holds.
        stages: of the run.
        checks: requirements that the user has set.
    """
    template = _environment().get_template(page.template)
    shown = {key: value for key, value in results.items() if key not in page.hidden}
    text = template.render(
        page=page, results=results, stages=stages, checks=checks, met=sum(check.met for check in checks),
        all_results=[(key, _text(value)) for key, value in flattened(shown)], versions=_versions(), **page.context,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors",
    )  # fmt: skip
    write_text(file, text)


def subscripts(formula: str) -> str:
    """Return a chemical formula with its numbers as subscripts."""
    return formula.translate(_SUBSCRIPTS)


def duration(seconds: float) -> str:
    """Return a time as ``12.3 s`` or ``5 min 04 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flowbridge.workflows", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "inlined": _inlined}
    return environment


def _inlined(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _text(value: Any) -> str:
    """Return a value as the list of all numbers shows it: six significant digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, list):
        return str(value)
    if any(isinstance(one, Mapping) for one in value):
        return json.dumps(value)
    return ", ".join(f"({_text(one)})" if isinstance(one, list) else _text(one) for one in value)
