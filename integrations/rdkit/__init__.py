"""RDKit: molecular graphs, structures and isomers."""
