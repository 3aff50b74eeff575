"""Electron densities: models in closed form and learned ones, fits to samples, responses to parameters, cube files."""
