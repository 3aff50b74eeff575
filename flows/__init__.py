"""Generative models with exact likelihood."""

from .. import core  # noqa: F401 (imported by itself, as ``flows``, this folder fails here: its modules have one name)
