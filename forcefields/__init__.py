"""Coarse-grained force fields."""

from .. import core  # noqa: F401 (imported by itself, as ``forcefields``, this folder fails here: its modules have one name)
