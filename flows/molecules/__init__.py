"""Molecules built atom by atom: an autoregressive model with exact likelihood, taught by imitation and reinforcement."""
