"""What a model file holds, for people (``flowbridge info``) and for programs (``--json``)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ase.symbols import Symbols
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.model_files.format import ModelHeader
from .stages import flattened


def molecule_formula(header: ModelHeader) -> str:
    """Return the formula in Hill order, such as ``C6H12N2O2``; beads that are no element count as ``X``."""
    return str(Symbols(header.particles.atomic_numbers).get_chemical_formula("hill"))


def stored_numbers(header: ModelHeader) -> dict[str, int]:
    """Return how many numbers of each dtype the file holds."""
    counts: Counter[str] = Counter()
    for dtype, shape in header.tensors.values():
        counts[dtype] += math.prod(shape)
    return dict(counts.most_common())


def information_as_json(header: ModelHeader) -> str:
    """Return the header as JSON, with the formula, and dtype and shape of every tensor."""
    content = header.model_dump(mode="json")
    content["formula"] = molecule_formula(header)
    content["tensors"] = {name: {"dtype": d, "shape": list(s)} for name, (d, s) in header.tensors.items()}
    return json.dumps(content, indent=1)


def print_information(header: ModelHeader, path: Path, console: Console) -> None:
    """Print a readable table of the header."""
    console.print(_table(str(path), _description(header, path.stat().st_size)))
    privacy = header.provenance.get("privacy")
    if isinstance(privacy, Mapping):
        console.print(_table("Privacy", list(_privacy(privacy))))
    for title, content in (("Training", header.provenance), ("Configuration", header.configuration)):
        rows = list(_flattened({key: value for key, value in content.items() if key not in {"particles", "privacy"}}))
        if rows:
            console.print(_table(title, rows))


def _description(header: ModelHeader, size: int) -> Iterator[tuple[str, str]]:
    particles = header.particles
    residues = dict(zip(particles.residue_indices, particles.residue_names, strict=True))
    counts = stored_numbers(header)
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.items())
    yield "kind", f"{header.kind} ({header.implementation})"
    if len(particles):
        yield "molecule", f"{molecule_formula(header)}, {len(particles)} particles, {len(particles.bonds)} bonds"
        yield "residues", _shortened(" ".join(residues[index] for index in sorted(residues)))
        yield "temperature", "none" if header.temperature is None else f"{header.temperature:g} K"
        yield "periodic", "yes" if header.periodic else "no"
    if header.global_parameters:
        yield "global parameters", ", ".join(f"{k} = {v:g}" for k, v in header.global_parameters.items())
    yield "numbers", f"{sum(counts.values()):,} in {len(header.tensors)} tensors ({kinds or 'none'})"
    yield "file", f"{size:,} bytes, format version {header.format_version}"
    yield "digest", f"{header.digest} (verified)"
    yield "created", header.created.isoformat(sep=" ", timespec="seconds")
    yield "units", ", ".join(f"{quantity} {unit}" for quantity, unit in header.units.items())
    yield "written by", ", ".join(f"{name} {number}" for name, number in header.versions.items())


def _privacy(ledger: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the ledger of private training in full: nothing of it is shortened."""
    for key, value in ledger.items():
        if key == "releases":
            for number, release in enumerate(value, 1):
                yield f"release {number}", ", ".join(f"{name} {part}" for name, part in _flattened(release))
        elif isinstance(value, list):
            yield key.replace("_", " "), "; ".join(str(entry) for entry in value)
        else:
            yield key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)


def _flattened(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in flattened(content):
        if isinstance(value, float):
            yield key, f"{value:.6g}"
        else:
            yield key, _shortened(value if isinstance(value, str) else json.dumps(value))


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _table(title: str, rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table
