"""Side-by-side measurements: ``python -m benchmarks.NAME`` prints a table with ratios and writes JSON."""
