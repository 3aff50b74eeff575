"""Adapters to simulation engines and analysis packages, one engine per module."""

from .. import core  # noqa: F401 (imported by itself, as ``integrations``, this folder fails here: its modules have one name)
