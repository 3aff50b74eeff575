"""Velocity fields of continuous flows: their velocities, divergences and compiled forms."""
