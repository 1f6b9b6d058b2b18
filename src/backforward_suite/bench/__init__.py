"""Benchmarks: medians of interleaved repeats, and ratios within one run."""
