"""OpenMM: potentials as forces, batched energies, trajectories."""
