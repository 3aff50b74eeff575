"""Beads of a coarse-grained molecule: mappings from atoms, frames, geometry, forces."""
