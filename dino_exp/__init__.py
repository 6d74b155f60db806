"""dino_exp: train DINO with exact resumption, durable checkpoints and versioned runs."""

__version__ = "0.1.0"
