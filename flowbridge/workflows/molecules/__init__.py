"""Isomers of a formula: enumerated, built, relaxed, ranked, and learnt from."""
