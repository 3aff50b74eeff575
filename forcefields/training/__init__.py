"""Training of coarse-grained force fields."""
