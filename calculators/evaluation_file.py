"""Evaluations stored by geometry in an SQLite file, which stays intact when a run is killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigurationError
from ..flows.molecules.training.evaluation import Evaluation

_RESOLUTION = 1e-5  # nm, of distances
_TABLE = (
    "CREATE TABLE IF NOT EXISTS evaluations "
    "(key TEXT PRIMARY KEY, energy REAL, fault TEXT, positions TEXT, evaluations INTEGER)"
)


class EvaluationFile:
    """Stored evaluations by geometry, independent of translation, rotation and reflection, but not of the order of atoms.

    Args:
        path: path of the file; None for memory.
        settings: settings of the evaluations; those with other settings are not found.

    Raises:
        ConfigurationError: when the file is no SQLite database.
    """

    def __init__(self, path: Path | None, settings: str) -> None:
        self._settings = settings
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(":memory:" if path is None else path, isolation_level=None)
        try:
            self._connection.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(
                f"{path}: is no file of evaluations ({error}); remove it, or name another"
            ) from error

    def key(self, numbers: Any, positions: Any) -> str:
        """Return the key of a geometry with positions ``(N, 3)`` in nm."""
        positions = np.asarray(positions, dtype=float)
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)[np.triu_indices(len(positions), 1)]
        rounded = np.nan_to_num(distances / _RESOLUTION, nan=-1.0, posinf=-2.0, neginf=-2.0).round().astype(np.int64)
        text = f"{self._settings} {[int(number) for number in numbers]} {rounded.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, numbers: Any, positions: Any) -> Evaluation | None:
        """Return the evaluation of a geometry, or None."""
        row = self._connection.execute(
            "SELECT energy, fault, positions, evaluations FROM evaluations WHERE key = ?",
            (self.key(numbers, positions),),
        ).fetchone()
        if row is None:
            return None
        return Evaluation(row[0], np.array(json.loads(row[2])).reshape(-1, 3), row[3], row[1], known=True)

    def store(self, numbers: Any, positions: Any, evaluation: Evaluation) -> None:
        """Store an evaluation; it is on disk when this returns."""
        positions_json = json.dumps(np.nan_to_num(evaluation.positions).tolist())
        self._connection.execute(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?)",
            (self.key(numbers, positions), evaluation.energy, evaluation.fault, positions_json, evaluation.evaluations),
        )
