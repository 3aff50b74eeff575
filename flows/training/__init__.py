"""Training of flows."""
