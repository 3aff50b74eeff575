"""What works on this machine: what ``flowbridge doctor`` tries."""
