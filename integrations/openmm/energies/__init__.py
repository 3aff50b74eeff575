"""Energies and forces of many configurations of a System: in threads, in processes, on a cluster, in torch."""
