"""Generative models with exact likelihood."""
