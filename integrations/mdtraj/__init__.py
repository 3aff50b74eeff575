"""mdtraj: topologies, trajectories and bead selections."""
