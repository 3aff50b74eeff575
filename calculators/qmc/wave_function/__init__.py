"""Trial wave functions, their optimisation, and samples of the electrons."""
