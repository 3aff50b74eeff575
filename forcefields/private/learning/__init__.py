"""How private models learn: DP-MAC and DP-SGD, and the models that are trained by them."""
