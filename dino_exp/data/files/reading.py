"""An image of a listing, read and decoded by one process in bounded memory, and what is wrong with it by its name.

Shapes: 3 channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dino_exp.data.files.decode import Pixels, UnreadableImageError, decode, stored_size
from dino_exp.data.files.listing import Listing, shown
from dino_exp.errors import DataError
from dino_exp.words import size_text

MOST_BYTES = 512 << 20
"""As many as the pixels of the largest image take. A file of more is not read: it would be in memory as a whole."""


def read_pixels(listing: Listing, number: int, side: int) -> Pixels:
    """(3, H, W) of an image. Raises UnreadableImageError, DataError of the file, or where memory does not suffice."""
    with _memory_of(listing, number):
        return decode(_data(listing, number), side)


def read_size(listing: Listing, number: int, side: int) -> tuple[int, int]:
    """Height and width of an image as it is decoded, before it is turned. Raises the same."""
    with _memory_of(listing, number):
        return stored_size(_data(listing, number), side)


def _data(listing: Listing, number: int) -> bytes:
    size = int(listing.sizes_N[number])
    if size > MOST_BYTES:
        raise UnreadableImageError(f"it has {size_text(size)}, expected at most {size_text(MOST_BYTES)}: reduce it")
    return listing.read(number)


@contextmanager
def _memory_of(listing: Listing, number: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as problem:
        raise DataError(
            f"{shown(listing.full_path(number))}: there is no memory to read and decode it; lower runtime.workers, or "
            "reduce the image"
        ) from problem
