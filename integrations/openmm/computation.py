"""The loader that serialised Systems name: its place and its arguments are part of that format, and stay."""

from __future__ import annotations

import contextlib
import json
import warnings

from ...core.evaluator import EvaluationOptions
from .forces.computation import OpenMMEvaluator, PotentialComputation, UnavailableComputation


def load_computation(path: str, digest: str, options: str) -> PotentialComputation | UnavailableComputation:
    """Rebuild a computation from its pickle, when OpenMM deserialises or copies a System.

    Never raises, because OpenMM 8.6.1 ends the process when unpickling fails: a file that cannot be used
    gives a warning now and an error with the same text at the first evaluation.

    Args:
        path: absolute path of the model file.
        digest: digest that the file must have.
        options: :class:`~flowbridge.core.evaluator.EvaluationOptions` as JSON.
    """
    try:
        return PotentialComputation(OpenMMEvaluator.of(path, EvaluationOptions(**json.loads(options)), digest=digest))
    except Exception as error:
        reason = f"the model file of a flowbridge force cannot be used: {error}"
        # A warning turned into an exception by a filter would end the process as well.
        with contextlib.suppress(Warning):
            warnings.warn(reason, stacklevel=2)
        return UnavailableComputation(path, digest, options, reason)
