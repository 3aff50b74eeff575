"""A cache of results between runs (compiled programs, timed plans): complete or absent, bounded in size."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from .errors import ConfigurationError

_DEFAULT_LIMIT = 2 * 1024**3
_RECORD = "record.json"
_STALE_SECONDS = 86400  # what is left of a process that was killed


def cache_folder(kind: str) -> Path:
    """Return the folder for results of one kind, in ``$FLOWBRIDGE_CACHE`` or the user's cache folder of the system."""
    chosen = os.environ.get("FLOWBRIDGE_CACHE")
    return Path(chosen or platformdirs.user_cache_dir("flowbridge", appauthor=False)) / kind


def size_limit() -> int:
    """Return how many bytes the folder may hold: ``$FLOWBRIDGE_CACHE_BYTES``, 2 GiB by default."""
    given = os.environ.get("FLOWBRIDGE_CACHE_BYTES", str(_DEFAULT_LIMIT))
    try:
        limit = int(given)
    except ValueError:
        limit = -1
    if limit < 0:
        raise ConfigurationError(f"FLOWBRIDGE_CACHE_BYTES must be a whole number of bytes, got {given!r}")
    return limit


def key_of(description: Mapping[str, Any]) -> str:
    """Return the key of a description, plain data: equal only where everything is."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache that holds a complete result.

    Attributes:
        folder: folder of its files.
        description: description that the key stands for.
        bytes: size of its files.
        used: when it was last used, seconds since the epoch.
    """

    folder: Path
    description: dict[str, Any]
    bytes: int
    used: float


class Cache:
    """Results of one kind under keys, shared by all processes of the user.

    A result appears whole or not at all (a folder renamed into place). Whatever is wrong with a stored result (files that
    are missing, cut off or altered, a description that is not the one asked for) makes it absent.

    Args:
        folder: folder of the results; see :func:`cache_folder`.
        limit: bytes that they may take; :func:`size_limit` where None.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = size_limit() if limit is None else limit

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the key: other processes that want to make the same result wait here. A lock dies with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / f"{key}.lock"):
            yield

    def find(self, description: Mapping[str, Any]) -> Path | None:
        """Return the folder of the result for ``description``, None when there is none that is whole."""
        folder = self.folder / key_of(description)
        try:
            record = json.loads((folder / _RECORD).read_text())
            whole = record["description"] == json.loads(json.dumps(description)) and all(
                _digest(folder / name) == digest for name, digest in record["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if not whole:
            return None
        with contextlib.suppress(OSError):  # a cache that others filled may be read-only
            os.utime(folder / _RECORD)  # last use, for eviction
        return folder

    @contextmanager
    def making(self, description: Mapping[str, Any]) -> Iterator[Path]:
        """Give an empty folder to put files into; when the block ends without an error they become the result.

        Afterwards the results that have not been used for longest go, until the cache keeps to its limit. Where two
        processes make the same result at the same time, one of them stays.

        Raises OSError where the folder cannot be written to.
        """
        key = key_of(description)
        part, target = self.folder / f"{key}.{os.getpid()}.part", self.folder / key
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            files = {path.name: _digest(path) for path in part.iterdir()}
            (part / _RECORD).write_text(json.dumps({"description": description, "files": files}, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            try:
                os.replace(part, target)
            except OSError:
                if self.find(description) is None:  # else another process was faster by a moment
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._evict(keep=target)

    def entries(self) -> list[CacheEntry]:
        """Return what the cache holds, last used first."""
        found = []
        for record in self.folder.glob(f"*/{_RECORD}"):
            try:
                description = json.loads(record.read_text())["description"]
                size = sum(path.stat().st_size for path in record.parent.iterdir())
                found.append(CacheEntry(record.parent, description, size, record.stat().st_mtime))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed by another process, or broken: find() treats it as absent
        return sorted(found, key=lambda entry: -entry.used)

    def holds(self, outline: Mapping[str, Any]) -> bool:
        """Return whether there is a result in whose description all items of ``outline`` are found."""
        items = json.loads(json.dumps(outline)).items()
        return any(
            all(name in entry.description and entry.description[name] == value for name, value in items)
            for entry in self.entries()
        )

    def _evict(self, keep: Path) -> None:
        total = 0
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit and entry.folder != keep:
                shutil.rmtree(entry.folder, ignore_errors=True)
        for stale in [*self.folder.glob("*.part"), *self.folder.glob("*.lock")]:
            with contextlib.suppress(FileNotFoundError):  # another process tidies up too
                if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
