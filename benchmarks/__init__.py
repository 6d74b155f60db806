"""Benchmarks: figures as ratios within one run, repeated, with the median."""
