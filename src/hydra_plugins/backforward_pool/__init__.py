"""Hydra launcher `pool`: one process a run, as many at a time as there are GPUs, else cores."""
