"""From a molecule to a coarse-grained force field: the stages of ``flowbridge coarse-grain``."""
