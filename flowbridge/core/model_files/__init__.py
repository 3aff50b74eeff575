"""Model files: a trained model saved, and exactly what was saved loaded again."""

from .files import load, read_header, save
from .format import ModelHeader
from .kinds import register_kind

__all__ = ["ModelHeader", "load", "read_header", "register_kind", "save"]
