"""Methods of private training, DP-MAC and DP-SGD, and the models that they train."""
