"""Coarse-grained force fields."""
