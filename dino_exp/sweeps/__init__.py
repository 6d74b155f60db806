"""Sweeps: what a `--multirun` will do, what it has done, and how to go on with it."""
