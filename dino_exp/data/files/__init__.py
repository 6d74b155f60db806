"""Data sets that lie in files: which there are, how they are decoded, and what is kept of that for the next start."""
