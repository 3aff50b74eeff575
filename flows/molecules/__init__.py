"""Molecules built atom by atom: an autoregressive model with exact likelihood, trained by imitation and reinforcement."""
