"""Counter-based randomness: every random number of a training is a pure function of what it is for.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a keyed bijection of a 128-bit counter. The key comes from (seed, purpose), the counter from three indices
of the caller's choice (epoch or step, sample, crop, layer, ...) and the number of the draw. Nothing is
stateful, so the order of calls, the number of workers and the point of a resume cannot change a value.

Every function is vectorised: the three indices broadcast against each other, and the draws form the last axis.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_WORDS = 4  # one Philox block gives four words of 32 bits

Words = NDArray[np.uint64]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, ...]:
    """Philox4x32-10 of arrays of counter words (each below 2**32, kept in uint64) under one 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Stream:
    """The random numbers of one purpose under one seed, for example `Stream(seed, "augment.digits")`."""

    seed: int
    purpose: str

    def _key(self) -> tuple[int, int]:
        digest = hashlib.blake2b(f"{self.seed}\0{self.purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def bits(self, *indices: ArrayLike, num: int) -> Words:
        """`num` words of 32 random bits for each combination of up to three indices.

        Shape: broadcast(indices) + (num,). Indices are whole numbers from 0 to 2**32 - 1.
        """
        if len(indices) > _WORDS - 1:
            raise ValueError(f"rng.Stream takes at most 3 indices, got {len(indices)}")
        arrays = np.broadcast_arrays(*[_as_index(index) for index in indices]) if indices else []
        shape = arrays[0].shape if arrays else ()
        blocks = np.arange(-(-num // _WORDS), dtype=np.uint64)
        full = (*shape, len(blocks))
        given = [np.broadcast_to(array[..., None], full) for array in arrays]
        given += [np.zeros(full, np.uint64)] * (_WORDS - 1 - len(given))
        words = philox((np.broadcast_to(blocks, full), *given), self._key())  # type: ignore[arg-type]
        return np.stack(words, axis=-1).reshape(*shape, -1)[..., :num]

    def uniform(self, *indices: ArrayLike, num: int) -> NDArray[np.float64]:
        """Uniform numbers in the open interval (0, 1), in steps of 2**-32."""
        return (self.bits(*indices, num=num).astype(np.float64) + 0.5) * 2.0**-32

    def normal(self, *indices: ArrayLike, num: int) -> NDArray[np.float64]:
        """Standard normal numbers, by the inverse of the distribution function (elementwise, so split-proof)."""
        return np.asarray(ndtri(self.uniform(*indices, num=num)))

    def permutation(self, *indices: ArrayLike, num: int) -> NDArray[np.int64]:
        """A random order of range(num) for each combination of indices (ties keep their order)."""
        pairs = self.bits(*indices, num=2 * num).reshape(*np.broadcast_shapes(*map(np.shape, indices)), num, 2)
        return np.argsort(pairs[..., 0] << _SHIFT | pairs[..., 1], axis=-1, kind="stable")


def _as_index(index: ArrayLike) -> Words:
    array = np.asarray(index)
    if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 0xFFFFFFFF)):
        raise ValueError(f"rng.Stream: an index must be whole and from 0 to 2**32 - 1, got {index!r}")
    return array.astype(np.uint64)
