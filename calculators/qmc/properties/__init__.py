"""What follows from an electron density: moments, charges, forces, contact densities, each with its error."""
