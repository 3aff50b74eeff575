"""How a molecule builder learns: by imitation of molecules and by reinforcement with energies."""
