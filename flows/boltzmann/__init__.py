"""Boltzmann generators of one molecule: internal coordinates, the flow on them, the generator, its proposals."""
