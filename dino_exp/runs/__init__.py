"""A run: its name, its directory, its record, its lock, and the code and environment that made it."""
