"""Helpers that several tests share: real training processes, and how to read what they left."""
