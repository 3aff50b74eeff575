"""Commands that enumerate, build and teach: isomers of a formula, with any ASE calculator as the judge."""
