"""Sweeps: many runs from one command, on this machine, under Slurm or on Ray."""
