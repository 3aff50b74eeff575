"""From a molecule to a Boltzmann generator: the stages of ``flowbridge run`` and ``flowbridge train``."""
