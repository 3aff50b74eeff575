"""Statistics of weighted samples: averages and their errors, free energies, surfaces."""
