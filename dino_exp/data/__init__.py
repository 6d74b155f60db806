"""Data: what the images are, in which order they come, who loads them, and what is done to them."""
