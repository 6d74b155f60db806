"""Numbers about arrays of weights: exact sums in float64, a block at a time, so that no copy of a tensor is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dino_exp.checkpoint.arrays import Array

_BLOCK = 1 << 15  # elements: two blocks of float64 fit the second cache of a core
_ROWS = 1 << 11  # of a matrix
_SINGLE = float(np.finfo(np.float32).eps)
_DEAD_SHARE = 0.01


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Inside, BLAS uses one thread: these products are small, and threads that wait would take a training's cores."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield


class Sums(NamedTuple):
    """Of two arrays a and b of one shape: sums of squares, of products and of squared differences; the largest."""

    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    difference: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]  # sums are added up, not strung together
        return Sums(
            self.a + other.a,
            self.b + other.b,
            self.product + other.product,
            self.difference + other.difference,
            max(self.largest, other.largest),
        )

    @property
    def distance(self) -> float:
        """The norm of a - b."""
        return float(np.sqrt(self.difference))

    @property
    def relative(self) -> float | None:
        """The norm of a - b over that of a; None where a is zero."""
        return float(np.sqrt(self.difference / self.a)) if self.a > 0 else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b; None where one is zero."""
        both = self.a * self.b
        return float(np.clip(self.product / np.sqrt(both), -1.0, 1.0)) if both > 0 else None


def square_sum(values: Array) -> float:
    """The sum of squares."""
    return sum(float(block @ block) for block in _blocks(values))


def change_sum(a: Array, b: Array) -> float:
    """The sum of squared differences of two arrays of one shape.

    Differences of float32 are taken in float32: of values that lie close together they are exact, and of others wrong
    by 6e-8 at most.
    """
    flat_a, flat_b, precise = a.reshape(-1), b.reshape(-1), np.result_type(a, b, np.float32)
    total = 0.0
    for start in range(0, len(flat_a), _BLOCK):
        end = start + _BLOCK
        apart = np.subtract(flat_a[start:end], flat_b[start:end], dtype=precise).astype(np.float64)
        total += float(apart @ apart)
    return total


def plain_sum(values: Array) -> float:
    """The sum."""
    return sum(float(block.sum()) for block in _blocks(values))


def sums_of(a: Array, b: Array) -> Sums:
    """What `Sums` holds of two arrays of one shape."""
    total = Sums()
    for one, other in zip(_blocks(a), _blocks(b), strict=True):
        apart = one - other
        total += Sums(
            float(one @ one), float(other @ other), float(one @ other), float(apart @ apart), float(np.abs(apart).max())
        )
    return total


def _blocks(values: Array) -> Iterator[Array]:
    flat = values.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK].astype(np.float64)


class Spectrum(NamedTuple):
    """Of the singular values of a matrix."""

    spectral_norm: float
    effective_rank: float


def spectrum_of(weight: Array) -> Spectrum | None:
    """Largest singular value, and the effective rank: exp of the entropy of the singular values' shares.

    Roy and Vetterli 2007. Of the first axis against all others; None for a weight that is zero or not finite, or that
    is no matrix.
    """
    if weight.ndim < 2 or not weight.size:
        return None
    matrix = weight.reshape(len(weight), -1)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    # On the smaller side: as good as an SVD for all but the tiniest values, and much cheaper.
    squares = _squared_singular(matrix, np.result_type(matrix, np.float32))
    if squares is not None and squares.min() < len(squares) * _SINGLE * squares.max():
        # Values that small drown in the rounding of float32, of low rank many of them. Float64 costs twice as much.
        squares = _squared_singular(matrix, np.dtype(np.float64))
    if squares is None:
        return None
    singular = np.sqrt(np.clip(squares, 0.0, None))
    total = singular.sum()
    if total == 0:
        return None
    shares = singular[singular > 0] / total
    return Spectrum(float(singular.max()), float(np.exp(-(shares * np.log(shares)).sum())))


def _squared_singular(matrix: Array, precise: np.dtype[Any]) -> NDArray[np.float64] | None:
    """By products of this precision, in parts that are added up in float64; None where these are not finite."""
    gram = np.zeros((matrix.shape[1], matrix.shape[1]))
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS].astype(precise, copy=False)
        gram += rows.T @ rows
    return np.asarray(np.linalg.eigvalsh(gram), np.float64) if np.isfinite(gram).all() else None


def dead_rows(second_moment_KD: Array) -> int:
    """How many prototypes (rows) receive next to no gradient, by Adam's second moment of their weights.

    Those whose gradient is below 1 % of the root mean square over all prototypes: neither student nor teacher puts
    weight on them for any image.
    """
    size_K = np.sqrt(second_moment_KD.astype(np.float64).mean(axis=1))
    return int((size_K < _DEAD_SHARE * np.sqrt((size_K**2).mean())).sum())
