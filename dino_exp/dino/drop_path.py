"""Stochastic depth (Huang et al. 2016) without a stateful generator.

Shapes: L layers, 2 branches of a layer (attention, MLP), V crops of each image, B images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dino_exp.errors import ConfigError
from dino_exp.rng import Stream


def drop_scales(
    *, seed: int, step: int, sample_ids_B: ArrayLike, num_crops: int, rate: float, depth: int
) -> Tensor | None:
    """Factors (L, 2, V, B), float32 on the CPU, for the residual branches; None when `rate` is 0.

    A layer is dropped with a probability that rises linearly from 0 to `rate` over the depth; the factor of
    a dropped branch is 0, of another one over the probability to keep it. Sample ids are indices into the
    whole data set, so the values of a sample do not depend on the batch around it.
    Raises ConfigError unless 0 <= rate < 1.
    """
    if not 0.0 <= rate < 1.0:
        raise ConfigError(f"model.drop_path_rate must be from 0 to below 1, got {rate}")
    if rate == 0.0:
        return None
    crops_V1, samples_1B = np.arange(num_crops)[:, None], np.asarray(sample_ids_B)[None, :]
    uniform_VBn = Stream(seed, "drop_path").uniform(step, samples_1B, crops_V1, num=2 * depth)
    uniform_L2VB = np.moveaxis(uniform_VBn, -1, 0).reshape(depth, 2, num_crops, -1)
    keep_L111 = 1.0 - np.linspace(0.0, rate, depth).reshape(depth, 1, 1, 1)
    scales_L2VB = np.where(uniform_L2VB < keep_L111, 1.0 / keep_L111, 0.0)
    return torch.from_numpy(scales_L2VB.astype(np.float32))
