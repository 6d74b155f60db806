"""Which images a step sees: pure functions of seed and step, so a resume needs no sampler state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dino_exp.errors import ConfigError
from dino_exp.rng import Stream


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in one pass over the data; the incomplete one is dropped.

    Raises ConfigError when not even one batch can be filled.
    """
    if not 1 <= batch_size <= num_samples:
        raise ConfigError(
            f"train.batch_size is {batch_size}, and the data set has {num_samples} images: "
            f"expected a number from 1 to {num_samples}; try train.batch_size={min(64, max(1, num_samples))}"
        )
    return num_samples // batch_size


@lru_cache(maxsize=2)  # every batch asks for it, and a million images take a while to shuffle
def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The order of the images in `epoch` (from 0): a permutation of range(num_samples), read-only."""
    order = Stream(seed, "data.order").permutation(epoch, num=num_samples)
    order.flags.writeable = False
    return order


def epoch_of(step: int, num_samples: int, batch_size: int) -> int:
    """The epoch (from 0) to which optimizer step `step` (from 1) belongs."""
    return (step - 1) // steps_per_epoch(num_samples, batch_size)


def batch_indices(seed: int, step: int, batch_size: int, num_samples: int) -> NDArray[np.int64]:
    """The images of optimizer step `step` (from 1), (batch_size,)."""
    epoch, position = divmod(step - 1, steps_per_epoch(num_samples, batch_size))
    order = epoch_order(seed, epoch, num_samples)
    return order[position * batch_size : (position + 1) * batch_size].copy()
