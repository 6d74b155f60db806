"""How good frozen features are: k nearest neighbours with all, ten and one label a class."""
