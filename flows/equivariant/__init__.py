"""Continuous flows of identical particles that know the symmetries of their energy (arXiv 2006.02425, 2306.15030)."""
