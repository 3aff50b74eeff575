"""Invertible maps of numbers and their parts: bijections, couplings, linear layers, root finding."""
