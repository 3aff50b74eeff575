"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .errors import ModelFileError


def write_whole(path: Path, blob: bytes) -> None:
    """Write ``blob`` next to ``path``, flush it to disk and rename it; an existing file is replaced.

    Raises:
        ModelFileError: when the file cannot be written; what was at ``path`` before is still there then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":  # the new name must survive a power cut, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be written ({error.strerror or error}). Check that the folder exists, has space "
            "and may be written to"
        ) from error
