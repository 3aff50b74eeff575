"""pandas: weights, reduced potentials and observables of samples as a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas
from numpy.typing import ArrayLike

from ..core.samples import WeightedSamples


def table_from_samples(
    samples: WeightedSamples, observables: Mapping[str, ArrayLike] | None = None
) -> pandas.DataFrame:
    """Return a table with one row per sample.

    Columns: ``log_weight``, ``weight`` (their sum is one), ``u_<name>`` for each reduced potential, and the
    observables under their own names. Temperature, units and provenance are in ``DataFrame.attrs``.

    Args:
        samples: S samples, whose positions are not in the table.
        observables: name and values ``(S,)`` of each observable.

    Raises:
        ValueError: when an observable is not one number per sample, or has the name of another column.
    """
    columns = {"log_weight": samples.log_weights, "weight": samples.weights}
    columns |= {f"u_{name}": values for name, values in samples.reduced_potentials.items()}
    for name, values in (observables or {}).items():
        array = np.asarray(values)
        if array.shape != (len(samples),) or name in columns:
            raise ValueError(
                f"observable {name!r} must have shape ({len(samples)},) and a name that is not one of "
                f"{sorted(columns)}, got shape {array.shape}"
            )
        columns[name] = array
    table = pandas.DataFrame(columns)
    table.index.name = "sample"
    table.attrs = {"temperature_K": samples.temperature, "provenance": dict(samples.provenance)}
    return table
