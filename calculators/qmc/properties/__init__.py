"""Properties of an electron density: moments, charges, forces, contact densities, each with its error."""
