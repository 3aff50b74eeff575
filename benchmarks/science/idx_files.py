"""MNIST from a local copy: files in the IDX format of http://yann.lecun.com/exdb/mnist, compressed by gzip or not."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTES = 8  # the code of unsigned bytes
_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(file: Path) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes.

    Raises:
        ValueError: when it is none, or cut short.
    """
    opened: Any = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rb") as stream:
        content = stream.read()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _BYTES:
        raise ValueError(f"{file} is no IDX file of unsigned bytes: it begins with {content[:4]!r}")
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes]) if len(content) >= 4 + 4 * axes else ()
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape))
    if not shape or len(values) != np.prod(shape):
        raise ValueError(f"{file} is cut short: {len(values)} numbers for an array of shape {shape}")
    return values.reshape(shape)


def read_mnist(folder: Path, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pixels ``(S, 784)`` from 0 to 1 and digits ``(S,)`` of ``train`` or ``test``.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: for files that are not in the format, or do not belong together.
    """
    images, labels = (read_idx(_found(folder, name)) for name in _NAMES[part])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}: {part} has images of shape {images.shape} and labels of shape {labels.shape}")
    return (images.reshape(len(images), -1) / 255.0).astype(np.float32), labels.astype(np.int64)


def _found(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{folder} holds neither {name} nor {name}.gz: --mnist takes a folder with the four files of MNIST"
    )
