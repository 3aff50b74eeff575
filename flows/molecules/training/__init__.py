"""Training of a molecule builder: imitation of molecules and reinforcement by energies."""
