"""Training with differential privacy: units, budgets and ledgers, DP-MAC and DP-SGD, private statistics, and audits."""
