"""Training with differential privacy: units, budgets and bills, DP-MAC and DP-SGD, private statistics, and audits."""
