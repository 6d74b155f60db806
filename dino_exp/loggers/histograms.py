"""Histograms of weights: the training copies them, and the thread that writes counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 64


@dataclass(frozen=True)
class Weights:
    """The parameters of a model after `step` steps, by name, copied."""

    step: int
    values: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of bins of equal width, in the names of TensorBoard's own record: `bucket_limit` are the upper edges."""

    min: float
    max: float
    num: float
    sum: float
    sum_squares: float
    bucket_limit: tuple[float, ...]
    bucket: tuple[float, ...]


def histogram_of(values: NDArray[np.float32]) -> Histogram | None:
    """The histogram of the finite elements; None where there is none."""
    flat = values[np.isfinite(values)].astype(np.float64)
    if not flat.size:
        return None
    counts, edges = np.histogram(flat, bins=NUM_BINS)
    return Histogram(
        min=float(flat.min()),
        max=float(flat.max()),
        num=float(flat.size),
        sum=float(flat.sum()),
        sum_squares=float(np.square(flat).sum()),
        bucket_limit=tuple(map(float, edges[1:])),
        bucket=tuple(map(float, counts)),
    )
