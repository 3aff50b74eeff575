"""The one runner of all pipelines: order, what is done already, what is left out, what failed, results, table and report."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core.errors import ConfigurationError, FlowbridgeError
from ..core.execution.progress import console
from ..core.training.processes import is_main_process
from .report import Check, Page, StageEntry, write_report
from .stages import Stage, StageFolder, read_json, write_json, write_text

FORMAT = 2
"""Format of ``results.json``; files without a number are of format 1."""
_KINDS_OF_FORMAT_1 = {"formula": "molecules", "beads": "coarse-graining", "molecule": "boltzmann"}


@dataclass(frozen=True)
class Selection:
    """Which stages of a pipeline are asked for: those up to ``until``, without those in ``skip``."""

    until: str | None = None
    skip: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        done: finished stages.
        failed: why a stage, or the report, failed, by name.
        left_out: stages that were skipped, come after the last one that was asked for, or need one that failed.
        results: what ``results.json`` holds.
    """

    done: dict[str, StageFolder] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """Stages in order, and what is made of their results.

    Attributes:
        kind: of the results, such as ``boltzmann``; a folder holds results of one kind.
        title: of the run, for tables and the report.
        output: folder of the run.
        stages: in the order in which they are done.
        goal: stage whose result users want. The run stops where it, or a stage that it needs, fails; the failure of any
            other stage is reported, and the rest goes on.
        headline: first entries of ``results.json``.
        page: what the pipeline adds to the report.
        checks: requirements that the user has set, against the results.
    """

    kind: str
    title: str
    output: Path
    stages: tuple[Stage, ...]
    goal: str
    headline: Mapping[str, Any]
    page: Callable[[Outcome], Page]
    checks: Callable[[Mapping[str, Any]], Sequence[Check]] = lambda results: ()


def run_pipeline(pipeline: Pipeline, selection: Selection | None = None) -> dict[str, Any]:
    """Do what is left to do of a pipeline, and return what ``results.json`` holds.

    A stage that was finished before with the same inputs is not repeated. A stage that fails is named under ``failed``, and
    the others go on, unless the goal of the pipeline needs it. Under ``torchrun`` the main process does all this; the others
    join it where flows are trained, and return nothing.

    Raises:
        ConfigurationError: for stages that cannot be left out, and for a folder with results of another kind, or of a newer
            version.
    """
    chosen = _chosen(pipeline, selection or Selection())
    _refuse_foreign_results(pipeline)
    pipeline.output.mkdir(parents=True, exist_ok=True)
    _say(f"{pipeline.title} -> {pipeline.output}")
    outcome = _done_stages(pipeline, chosen)
    if not is_main_process():
        return {}
    files = _copied(pipeline, outcome)
    entries = _summarise(pipeline, outcome)
    write_json(pipeline.output / "results.json", outcome.results)
    checks = pipeline.checks(outcome.results)
    try:
        page = pipeline.page(outcome)
    except Exception as error:  # a picture that cannot be drawn costs nobody the results
        outcome.failed["report"] = _sentence(error)
        write_json(pipeline.output / "results.json", outcome.results)
        page = Page(pipeline.title, "The figures of this report could not be made.")
    write_report(pipeline.output / "report.html", page, outcome.results, entries, checks)
    _print(pipeline, outcome, entries, checks, files)
    return outcome.results


def _chosen(pipeline: Pipeline, selection: Selection) -> list[Stage]:
    """Return the stages that are asked for; refuse names that do not exist, and gaps."""
    names = [name for stage in pipeline.stages for name in dict.fromkeys((stage.name, stage.role))]
    for name in (*selection.skip, *([selection.until] if selection.until else [])):
        if name not in names:
            raise ConfigurationError(f"there is no stage {name!r} here; the stages are {', '.join(names)}")
    chosen: list[Stage] = []
    for stage in pipeline.stages:
        if not {stage.name, stage.role} & set(selection.skip):
            missing = [name for name in stage.needs if name not in {one.role for one in chosen}]
            if missing:
                raise ConfigurationError(
                    f"the stage {stage.name} needs {' and '.join(missing)}: leave out both (--skip {stage.name}), or neither"
                )
            chosen.append(stage)
        if selection.until in (stage.name, stage.role):
            break
    return chosen


def _refuse_foreign_results(pipeline: Pipeline) -> None:
    """Refuse a folder with results of something else; those of the version before are recognised."""
    file = pipeline.output / "results.json"
    found = read_json(file)
    if found is None:
        return
    number = found.get("format", 1)
    if number > FORMAT:
        raise ConfigurationError(
            f"{file} has format {number}, and this version of flowbridge writes {FORMAT}: use the newer version that wrote "
            "it, or another folder (--output)"
        )
    former = next((kind for key, kind in _KINDS_OF_FORMAT_1.items() if key in found), "something else")
    kind = found.get("kind", former)
    if kind != pipeline.kind:
        raise ConfigurationError(
            f"{pipeline.output} holds results of another kind ({kind}, not {pipeline.kind}): give another folder (--output)"
        )
    if number < FORMAT:
        _say(f"{file} is of a former version: stages with the same inputs are used, others are done again")


def _done_stages(pipeline: Pipeline, chosen: Sequence[Stage]) -> Outcome:
    outcome = Outcome()
    essential = _with_needs(pipeline)
    for number, stage in enumerate(chosen, 1):
        if not is_main_process() and not any(one.together for one in chosen[number - 1 :]):
            break
        if any(name not in outcome.done for name in stage.needs):
            continue
        known = StageFolder.open(
            stage.output or pipeline.output, stage.name, stage.all_inputs(outcome.done), stage.former_name
        )
        state = ": done before" if known.results is not None else ""
        _say(f"{number}/{len(chosen)} {stage.name}, {stage.title}{state}")
        if not state:
            for change in known.changes():
                _say(f"    changed since the last time: {change}")
        try:
            outcome.done[stage.role] = stage.completed(pipeline.output, outcome.done)
        except Exception as error:
            if stage.role in essential or (stage.together and _several_processes()):
                raise
            outcome.failed[stage.name] = _sentence(error)
            file = known.folder / "error.txt"
            write_text(file, traceback.format_exc())
            _warn(f"the stage {stage.name} failed, and the others go on (traceback in {file})")
    tried = {*outcome.done, *outcome.failed}
    outcome.left_out = [one.name for one in pipeline.stages if not {one.name, one.role} & tried]
    return outcome


def _with_needs(pipeline: Pipeline) -> set[str]:
    """Return the goal and all stages that it needs."""
    by_role = {stage.role: stage for stage in pipeline.stages}
    found, waiting = set[str](), [pipeline.goal]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += by_role[name].needs
    return found


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, FlowbridgeError) else f"{type(error).__name__}: {error}"


def _copied(pipeline: Pipeline, outcome: Outcome) -> dict[str, str]:
    """Copy what users take away to the top of the folder; return what each file is, by name."""
    files = {}
    for stage in pipeline.stages:
        for one in stage.writes if stage.role in outcome.done else ():
            source, target = outcome.done[stage.role].folder / one.file, pipeline.output / (one.name or one.file)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():  # a stage of a former version put some files to the top alone
                shutil.copyfile(source, target)
            if target.exists():
                files[one.name or one.file] = one.what
    return files


def _summarise(pipeline: Pipeline, outcome: Outcome) -> list[StageEntry]:
    """Put the results together, and return what the table and the report say of each stage."""
    results, entries, seconds, warnings = outcome.results, [], {}, []
    results |= {"format": FORMAT, "kind": pipeline.kind, **pipeline.headline}
    for stage in pipeline.stages:
        if stage.role not in outcome.done:
            entries.append(StageEntry(stage.name, stage.title, None, (), outcome.failed.get(stage.name, "left out")))
            continue
        found = {k: v for k, v in (outcome.done[stage.role].results or {}).items() if k not in stage.unlisted}
        seconds[stage.role] = found.pop("wall_seconds")
        warnings += found.pop("warnings", [])
        if stage.under:
            results[stage.under] = {**results.get(stage.under, {}), **found}
        else:
            results |= found
        entries.append(StageEntry(stage.name, stage.title, seconds[stage.role], tuple(stage.summary(found))))
    results |= {"warnings": warnings, "failed": outcome.failed, "left_out": outcome.left_out}
    results["wall_seconds"] = {**seconds, "total": sum(seconds.values())}
    return entries


def _print(
    pipeline: Pipeline,
    outcome: Outcome,
    entries: Sequence[StageEntry],
    checks: Sequence[Check],
    files: Mapping[str, str],
) -> None:
    shown = Console()
    table = Table(title=escape(pipeline.title), title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", justify="right")
    table.add_column(overflow="fold")
    for entry in entries:
        failed = entry.name in outcome.failed
        state = f"{entry.seconds:.1f} s" if entry.seconds is not None else "FAILED" if failed else ""
        table.add_row(entry.name, state, escape(entry.problem or entry.title), style="bold red" if failed else "bold")
        for row in entry.rows:
            table.add_row(f"  {escape(row.name)}", escape(row.value), escape(row.note))
    if checks:
        table.add_row("requirements", style="bold")
    for check in checks:
        state = "met" if check.met else "NOT MET"
        table.add_row(f"  {check.key}", state, f"{check.measured}; required: {check.required}")
    shown.print(table)
    for warning in outcome.results["warnings"]:
        _warn(warning)
    every = {**files, "results.json": "all numbers", "report.html": "the report"}
    for name, what in every.items():
        shown.print(f"{pipeline.output / name}: {what}", soft_wrap=True, highlight=False, markup=False)
    for name, reason in outcome.failed.items():
        Console(stderr=True, soft_wrap=True).print(
            f"failed: {name}: {reason}", style="red", markup=False, highlight=False
        )


def _say(text: str) -> None:
    """Print a headline to the terminal's error stream, where the progress bars are."""
    if is_main_process():
        console.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    if is_main_process():
        Console(stderr=True, soft_wrap=True).print(f"warning: {text}", style="yellow", markup=False, highlight=False)
