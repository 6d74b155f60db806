"""Checkpoints that several processes write and read together, under whatever sharding."""
