"""Sampling with OpenMM: dynamics, biases, annealing, moves of a Boltzmann generator."""
