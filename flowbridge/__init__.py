"""Trained normalizing flows and learned force fields as OpenMM forces, ASE calculators and Boltzmann samplers."""
