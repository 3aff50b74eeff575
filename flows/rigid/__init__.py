"""Flows of rigid bodies: positions on a torus, orientations as unit quaternions up to sign (arXiv 2301.11355)."""
