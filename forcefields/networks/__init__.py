"""Networks that give the energy of beads."""
