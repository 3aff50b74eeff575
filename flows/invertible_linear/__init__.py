"""Linear layers that stay invertible while they are trained, by perturbations of rank one (arXiv 2010.07033)."""
