"""Runs experiments with Backforward: configs, training, sweeps, studies, reports."""
