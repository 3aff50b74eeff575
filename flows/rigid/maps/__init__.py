"""Invertible maps of positions and orientations of rigid bodies."""
