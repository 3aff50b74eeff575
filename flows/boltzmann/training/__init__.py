"""How a Boltzmann generator is trained: objectives, their gradients, the stages."""
