"""Weights out of runs and into them: names, files of other programs, and models built of them."""
