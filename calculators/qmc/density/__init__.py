"""Electron densities: models in closed form and learnt ones, their fit to samples, their symmetry, their files."""
