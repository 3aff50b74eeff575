"""How work is executed: independent jobs over processes, the main process of a training, progress bars, the machine."""
