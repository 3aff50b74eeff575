"""Ahead-of-time compiled potentials: one native call for energy and forces, cached for this machine."""
