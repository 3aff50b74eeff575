"""Stochastic normalizing flows: paths of bijections and stochastic kernels with exact weights (arXiv 2002.06707)."""
