"""Training of Boltzmann generators: objectives, their gradients, the stages."""
