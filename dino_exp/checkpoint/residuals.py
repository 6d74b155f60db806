"""What is left of a block of numbers once other numbers of the same shape have said what they can, and back again.

A block is seen as unsigned words. A float's words ascend with its size, so a small change is a small difference of
words. `Way.LINEAR` first predicts from several blocks at once, for example a moving average from itself a while ago and
from what it averages. The prediction is made in double precision from normal numbers only and ends in a normal number
or zero, so that it is the same on every processor, whatever a library has told it to do about denormal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dino_exp.checkpoint.planes import Words

Doubles = npt.NDArray[np.float64]

MAX_WEIGHTS = 3
_CACHED_WORDS = 1 << 14
LINEAR_TYPE = "float32"
FLOATS = ("float64", "float32", "float16", "bfloat16")
_EXPONENTS, _FIRST_NORMAL, _LAST_NORMAL = np.uint32(0x7F80_0000), np.uint32(0x0080_0000), np.uint32(0x7F00_0000)


class Way(IntEnum):
    """How a block's words became the words that are stored. The numbers are part of the format."""

    PLAIN = 0  # as they are
    TURNED = 1  # rotated by one bit, so that a float's exponent has a byte of its own and the sign comes last
    XOR = 2  # exclusive or with the first other block
    DIFFERENCE = 3  # from the first other block, as whole numbers
    LINEAR = 4  # from a weighted sum of all others, as whole numbers; float32


def subtract(way: Way, words: Words, others: Sequence[Words], weights: Sequence[float] = ()) -> Words:
    """What `way` leaves of `words`."""
    return _in_parts(_subtract, way, words, others, weights)


def add(way: Way, left: Words, others: Sequence[Words], weights: Sequence[float] = ()) -> Words:
    """The inverse of `subtract`."""
    return _in_parts(_add, way, left, others, weights)


def _in_parts(
    act: Callable[[Way, Words, Sequence[Words], Sequence[float]], Words],
    way: Way,
    words: Words,
    others: Sequence[Words],
    weights: Sequence[float],
) -> Words:
    """Word by word the same as `act` of all: what it needs on the way stays in the processor's cache."""
    made: Words = np.empty_like(words)
    for at in range(0, len(words), _CACHED_WORDS):
        part = slice(at, at + _CACHED_WORDS)
        made[part] = act(way, words[part], [other[part] for other in others], weights)
    return made


def _subtract(way: Way, words: Words, others: Sequence[Words], weights: Sequence[float]) -> Words:
    match way:
        case Way.PLAIN:
            return words
        case Way.TURNED:
            return _turn(words, 1)
        case Way.XOR:
            return words ^ others[0]
        case Way.DIFFERENCE:
            return _fold(words - others[0])
        case Way.LINEAR:
            return _fold(words - predict(others, weights))


def _add(way: Way, left: Words, others: Sequence[Words], weights: Sequence[float]) -> Words:
    match way:
        case Way.PLAIN:
            return left
        case Way.TURNED:
            return _turn(left, 8 * left.itemsize - 1)
        case Way.XOR:
            return left ^ others[0]
        case Way.DIFFERENCE:
            return others[0] + _unfold(left)
        case Way.LINEAR:
            return predict(others, weights) + _unfold(left)


def predict(others: Sequence[Words], weights: Sequence[float]) -> Words:
    """The float32 words of the sum of `weights` times `others`, each a block of float32 words."""
    total = doubles(others[0]) * weights[0]
    for other, weight in zip(others[1:], weights[1:], strict=True):
        total += doubles(other) * weight
    with np.errstate(over="ignore"):  # to infinity, everywhere alike
        predicted: Words = total.astype(np.float32).view(np.uint32)
    # Also the smallest normal numbers: processors differ in whether what is rounded up to one was denormal.
    predicted[(predicted & _EXPONENTS) <= _FIRST_NORMAL] = 0
    return predicted


def doubles(words: Words) -> Doubles:
    """Float32 words as numbers; denormal ones, infinities and NaN as zero."""
    odd = (words & _EXPONENTS) - _FIRST_NORMAL >= _LAST_NORMAL  # one comparison: zero's exponent wraps around
    if odd.any():
        words = np.where(odd, np.uint32(0), words)
    return words.view(np.float32).astype(np.float64)


def _turn(words: Words, num_bits: int) -> Words:
    width, kind = 8 * words.itemsize, words.dtype.type
    turned: Words = (words << kind(num_bits)) | (words >> kind(width - num_bits))
    return turned


def _fold(differences: Words) -> Words:
    """Small differences either way become small words: 0, -1, 1, -2, ... are 0, 1, 2, 3, ..."""
    signed = differences.view(differences.dtype.str.replace("u", "i"))
    folded: Words = ((signed << 1) ^ (signed >> (8 * differences.itemsize - 1))).view(differences.dtype)
    return folded


def _unfold(folded: Words) -> Words:
    one = folded.dtype.type(1)
    unfolded: Words = (folded >> one) ^ (~(folded & one) + one)
    return unfolded
