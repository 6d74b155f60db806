"""The index of all runs and checkpoints below an outputs folder: derived from their files, safe to delete."""
