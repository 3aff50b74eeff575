"""Invertible maps of numbers, and what they are made of: bijections, couplings, linear layers, root finding."""
