"""Evaluations of a checkpoint after training: what is examined, how, and where the results go."""
