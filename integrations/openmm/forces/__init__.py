"""Learned potentials as forces of a System."""
