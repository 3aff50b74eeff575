"""Compiled programs: made once for what they depend on, kept in the user's cache, checked whenever they are loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..cache import Cache, cache_folder, key_of
from ..errors import CompilationError, ConfigurationError
from ..execution.machine import compiler

CompilationMode = Literal["auto", "always", "cached", "never"]
"""``always`` compiles or fails, ``cached`` uses what is there and compiles nothing, ``never`` evaluates with torch.

``auto`` is what ``$FLOWBRIDGE_COMPILE`` says; without it, what gains by it is compiled, and evaluated with torch, with a
warning that gives the reason, where that does not work.
"""

PROGRAMS = "compiled"
"""The kind of the cache in which programs are kept."""

PACKAGE = "program.pt2"
"""Name of a program's file in its folder."""

_FAILURE = "failure.json"

_STOPPED = (-signal.SIGINT, -signal.SIGTERM)
"""How a compiler ends that somebody stopped, which says nothing of the program."""


class _CompilerStoppedError(CompilationError):
    """Nothing to remember: the next attempt may be left to finish."""


Made = TypeVar("Made", covariant=True)


class Recipe(Protocol[Made]):
    """What can be compiled: how to record it, how to check it, and all that it depends on."""

    def __str__(self) -> str:
        """Return what users are told that is compiled."""
        ...

    def description(self) -> dict[str, Any]:
        """Return all that the program depends on."""
        ...

    def outline(self) -> dict[str, Any]:
        """Return the part of the description that is known before anything is recorded, which takes seconds."""
        ...

    def options(self) -> dict[str, Any]:
        """Return options of the compiler."""
        ...

    def exported(self) -> ExportedProgram:
        """Return the program that the compiler gets; raises CompilationError where there is none."""
        ...

    def finish(self, folder: Path) -> None:
        """Check a fresh program against torch, and put next to it what later loads need; raises CompilationError."""
        ...

    def loaded(self, folder: Path) -> Made | None:
        """Return what is made of the program of a folder, None where it gives other results; any error says the same."""
        ...


def resolved(mode: str) -> str:
    """Return the mode that ``auto`` stands for, and any other as it is; raises ConfigurationError for unknown ones."""
    known = get_args(CompilationMode)
    if mode not in known:
        raise ConfigurationError(f"compilation must be one of {', '.join(map(repr, known))}, got {mode!r}")
    if mode != "auto":
        return mode
    chosen = os.environ.get("FLOWBRIDGE_COMPILE", "auto")
    if chosen not in known:
        raise ConfigurationError(f"FLOWBRIDGE_COMPILE must be one of {', '.join(known)}, got {chosen!r}")
    return chosen


def get_or_build(
    recipe: Recipe[Made], cache: Cache | None = None, *, build: bool = True, rebuild: bool = False
) -> Made | None:
    """Return what a recipe makes, from the cache, or compiled now if it is not there.

    Args:
        recipe: what to compile.
        cache: where to look and keep; the user's cache folder where None.
        build: whether to compile; otherwise the answer is None where the cache has nothing.
        rebuild: compile even if it is there, or failed before.

    Raises:
        CompilationError: when it cannot be recorded, the compiler fails or is not there, its code gives other results, or
            the cache cannot be written to.
    """
    cache = cache or Cache(cache_folder(PROGRAMS))
    if not build and not cache.holds(recipe.outline()):
        return None
    description = recipe.description()

    def found() -> Made | None:
        folder = None if rebuild else cache.find(description)
        return None if folder is None else _loaded(recipe, folder)

    ready = found()
    if ready is not None or not build:
        return ready
    try:
        with cache.locked(key_of(description)):
            # Another process may have made it while this one waited.
            return found() or _built(recipe, cache, description, rebuild)
    except OSError as error:
        raise CompilationError(
            f"nothing can be kept in {cache.folder} ({error}): name a folder that can be written to in FLOWBRIDGE_CACHE"
        ) from error


def _built(recipe: Recipe[Made], cache: Cache, description: dict[str, Any], rebuild: bool) -> Made | None:
    """Record, compile, check, keep."""
    present = compiler()
    if present is None:
        raise CompilationError(
            "there is no C++ compiler here: install g++ (or set CXX to one), or compile the model with "
            "'flowbridge compile' on a machine like this one and share the cache folder (FLOWBRIDGE_CACHE)"
        )
    attempt = {**description, "failed with": present, "flowbridge": version("flowbridge")}
    _raise_known_failure(cache, attempt, rebuild)
    program = recipe.exported()
    try:
        with _told(recipe), cache.making(description) as folder:
            _compile(program, folder / PACKAGE, recipe.options())
            recipe.finish(folder)
    except _CompilerStoppedError:
        raise
    except CompilationError as error:
        with cache.making(attempt) as folder:
            (folder / _FAILURE).write_text(json.dumps({"reason": str(error)}))
        raise
    return _loaded(recipe, cache.folder / key_of(description))


def _loaded(recipe: Recipe[Made], folder: Path) -> Made | None:
    try:
        return recipe.loaded(folder)
    except Exception as error:
        warnings.warn(f"the compiled program in {folder} cannot be used and is compiled again: {error}", stacklevel=2)
        return None


def _raise_known_failure(cache: Cache, attempt: dict[str, Any], rebuild: bool) -> None:
    """Raise what the same attempt failed with before, so that a script does not wait for it at every start."""
    folder = None if rebuild else cache.find(attempt)
    if folder is not None:
        reason = json.loads((folder / _FAILURE).read_text())["reason"]
        raise CompilationError(f"{reason} (as when it was tried before; 'flowbridge compile --rebuild' tries again)")


@contextmanager
def _told(recipe: object) -> Iterator[None]:
    """Say on the terminal that a compilation goes on, and how it ended."""
    begin = time.monotonic()
    print(f"flowbridge: compiling {recipe} for this machine, once; a minute or two", file=sys.stderr, flush=True)
    ending = "could not compile"
    try:
        yield
        ending = "compiled"
    finally:
        print(f"flowbridge: {ending} {recipe} in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def _compile(program: ExportedProgram, package: Path, options: dict[str, Any]) -> None:
    """Run the compiler in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="flowbridge-compile-") as name:
        folder = Path(name)
        torch.export.save(program, folder / "program.pt2")
        job = {"program": str(folder / "program.pt2"), "package": str(package), "options": options}
        (folder / "job.json").write_text(json.dumps(job))
        # A cache of its own, so that nothing depends on what torch compiled before; the compiler's threads are the workers'.
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "flowbridge.core.compilation.worker", str(folder / "job.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        cause = said[-1] if said else "it said nothing"
        if done.returncode in _STOPPED:
            raise _CompilerStoppedError(f"the compiler was stopped by {signal.Signals(-done.returncode).name}")
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise CompilationError(f"the compiler {how}: {cause[:500]}")


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest finite expected value; NaN and infinities must coincide."""
    found, expected = found.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = expected[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found[finite] - expected[finite]).abs().max() / scale)
