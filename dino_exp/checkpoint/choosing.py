"""Which way to store a block: tried on a sample of it, by the entropy of its byte planes. Pure.

Nothing here is part of the format: a block says how it was stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dino_exp.checkpoint.planes import Words
from dino_exp.checkpoint.residuals import FLOATS, LINEAR_TYPE, Way, doubles, subtract

_SAMPLE_WORDS = 4096
_RUN_WORDS = 512  # neighbours belong together: a sample is a few runs, not single words
_LOW_QUANTILES = (0.02, 0.1)


@dataclass(frozen=True)
class Choice:
    """A way, which of the other blocks it needs (their places), its weights, and the share of the bytes it leaves."""

    way: Way
    needs: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    share: float = 1.0


def choose(words: Words, others: Sequence[Words], dtype: str, sets: Sequence[tuple[int, ...]]) -> Choice:
    """The way that promises to leave the least. `sets` are the places in `others` that may be used together."""
    own, theirs = _sample(words), [_sample(other) for other in others]
    found = [
        Choice(choice.way, choice.needs, choice.weights, _share(own, theirs, choice))
        for choice in _candidates(own, theirs, dtype, sets)
    ]
    return min(found, key=lambda choice: choice.share)  # of equals the first, which is the simpler one


def _candidates(own: Words, theirs: Sequence[Words], dtype: str, sets: Sequence[tuple[int, ...]]) -> Iterator[Choice]:
    yield Choice(Way.TURNED if dtype in FLOATS else Way.PLAIN)
    for needs in sets:
        others = [theirs[place] for place in needs]
        if len(needs) == 1:
            yield Choice(Way.DIFFERENCE, needs)
            yield Choice(Way.XOR, needs)
        if dtype == LINEAR_TYPE:
            for weights in _ratios(own, others[0]) if len(needs) == 1 else _fit(own, others):
                yield Choice(Way.LINEAR, needs, weights)


def _ratios(own: Words, other: Words) -> Iterator[tuple[float, ...]]:
    """A second moment forgets by a constant factor: it is at least this factor times what it was."""
    mine, its = doubles(own), doubles(other)
    both = (mine != 0) & (its != 0)
    if both.any():
        ratios = mine[both] / its[both]
        yield from ((float(weight),) for weight in {*np.quantile(ratios, _LOW_QUANTILES)} if 0 < weight < 2)


def _fit(own: Words, others: Sequence[Words]) -> Iterator[tuple[float, ...]]:
    """Least squares around the first: a moving average moves towards what it averages."""
    first, *rest = map(doubles, others)
    moves = np.stack([other - first for other in rest], axis=1)
    if np.isfinite(moves).all():
        weights, *_ = np.linalg.lstsq(moves, doubles(own) - first, rcond=None)
        if np.isfinite(weights).all() and np.abs(weights).max() < 2:
            yield (1.0 - float(weights.sum()), *map(float, weights))


def _share(own: Words, theirs: Sequence[Words], choice: Choice) -> float:
    """Order-0 entropy of the planes that the choice leaves of the sample, over their size."""
    left = subtract(choice.way, own, [theirs[place] for place in choice.needs], choice.weights)
    planes = np.ascontiguousarray(left).view(np.uint8).reshape(-1, left.itemsize)
    entropies = [_entropy(planes[:, at]) for at in range(left.itemsize)]
    return sum(entropies) / (8 * left.itemsize)


def _entropy(plane: Words) -> float:
    """Bits of a byte. A sample of n sees at most n different values, so what is noise is rounded up to eight."""
    counts = np.bincount(plane, minlength=256)
    shares = counts[counts > 0] / len(plane)
    bits = float(-(shares * np.log2(shares)).sum()) + (len(shares) - 1) / (2 * len(plane)) * np.log2(np.e)
    return 8.0 if bits > 7.95 else bits


def _sample(words: Words) -> Words:
    if len(words) <= _SAMPLE_WORDS:
        return words
    starts = np.linspace(0, len(words) - _RUN_WORDS, _SAMPLE_WORDS // _RUN_WORDS).astype(int)
    return np.concatenate([words[start : start + _RUN_WORDS] for start in starts])
