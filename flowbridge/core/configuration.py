"""Configurations: validated, frozen, and without room for misspelt keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A part of a configuration: unknown keys are refused, and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
