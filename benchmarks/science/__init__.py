"""Tables of the published methods, recomputed by one command each."""
