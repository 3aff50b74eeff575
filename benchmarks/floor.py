"""The arithmetic of a flow's networks and nothing else: matrix-vector products of the same shapes, in C."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# Forward: dot products with the rows of each matrix. Backward: the transpose, row by row. What a compiler makes of this with
# -O3 -march=native is the arithmetic at one configuration, without activations, transforms or coordinates.
_SOURCE = r"""
void chain(const float *weights, const int *rows, const int *columns, int layers, float *x, float *y) {
    const float *w = weights;
    for (int layer = 0; layer < layers; layer++) {
        int m = rows[layer], n = columns[layer];
        for (int i = 0; i < m; i++) {
            float sum = 0.0f;
            for (int j = 0; j < n; j++) sum += w[i * n + j] * x[j];
            y[i] = sum;
        }
        w += m * n;
    }
    for (int layer = layers - 1; layer >= 0; layer--) {
        int m = rows[layer], n = columns[layer];
        w -= m * n;
        for (int j = 0; j < n; j++) x[j] = 0.0f;
        for (int i = 0; i < m; i++) {
            float g = y[i];
            for (int j = 0; j < n; j++) x[j] += w[i * n + j] * g;
        }
    }
}
"""


def matrix_vector_chain(module: torch.nn.Module) -> Callable[[], object]:
    """Return a call that does the multiply-adds of all linear layers of ``module``, forward and backward, once."""
    layers = [
        layer.weight.detach().float().contiguous() for layer in module.modules() if isinstance(layer, torch.nn.Linear)
    ]
    weights = np.concatenate([layer.numpy().ravel() for layer in layers]) * np.float32(0.01)
    rows = np.array([layer.shape[0] for layer in layers], dtype=np.int32)
    columns = np.array([layer.shape[1] for layer in layers], dtype=np.int32)
    size = int(max(rows.max(), columns.max()))
    x, y = np.ones(size, dtype=np.float32), np.ones(size, dtype=np.float32)
    folder = Path(tempfile.mkdtemp(prefix="flowbridge-floor-"))
    (folder / "chain.c").write_text(_SOURCE)
    library = folder / "chain.so"
    command = f"{os.environ.get('CC', 'gcc')} -O3 -march=native -ffast-math -shared -fPIC -o".split()
    subprocess.run([*command, str(library), str(folder / "chain.c")], check=True)
    function = ctypes.CDLL(str(library)).chain
    values = [ctypes.c_void_p(array.ctypes.data) for array in (weights, rows, columns)]
    vectors = [ctypes.c_void_p(array.ctypes.data) for array in (x, y)]
    count = ctypes.c_int(len(layers))
    keep = (weights, rows, columns, x, y)

    def call() -> object:
        x.fill(1e-3)
        function(*values, count, *vectors)
        return keep

    return call
