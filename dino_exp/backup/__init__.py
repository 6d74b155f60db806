"""Backups of runs: what is sent where, what came back, and whether it is what it was."""
