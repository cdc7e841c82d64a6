"""A run and its output folder: command line, plan, checkpoints, signals, processes, provenance."""
