"""Settings: their schema and roles, their checks, their hash, and the Hydra side that composes them."""
