"""Making the cache of decoded images: once, by several processes, so that a kill at any moment leaves no half of it."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dino_exp.data.files.cache import ENTRY, Made, head_digest
from dino_exp.data.files.crew import answers
from dino_exp.data.files.dataset import unreadable
from dino_exp.data.files.decode import UnreadableImageError
from dino_exp.data.files.listing import Listing, Progress
from dino_exp.data.files.placing import CACHE_ADVICE, UnwrittenError, placed
from dino_exp.data.files.reading import read_pixels, read_size
from dino_exp.data.files.unreadable import tasks_of
from dino_exp.fsio import LOCAL, Files, WriteHandle
from dino_exp.words import size_text

log = logging.getLogger("dino_exp")

_SAMPLED = 256
_ROOM = 1.05  # the estimate is of a sample

Answer = tuple[list[tuple[int, int, int]], dict[int, str]]
"""Height, width and checksum of each image, and why those that have none could not be decoded."""


@dataclass(frozen=True)
class Decode:
    """Decode images: their pixels one after the other, those of `known_bad` left out."""

    listing: Listing
    side: int
    known_bad: frozenset[int]

    def __call__(self, numbers: range) -> tuple[Answer, bytes]:
        """Raises DataError for a file that is not what was listed."""
        sizes, reasons, blocks = [], dict[int, str](), []
        for number in numbers:
            try:
                if number in self.known_bad:
                    raise UnreadableImageError("known")
                pixels = read_pixels(self.listing, number, self.side)
            except UnreadableImageError as problem:
                sizes.append((0, 0, 0))
                reasons[number] = str(problem)
                continue
            blocks.append(pixels.tobytes())
            sizes.append((pixels.shape[1], pixels.shape[2], xxhash.xxh3_64_intdigest(blocks[-1])))
        return (sizes, reasons), b"".join(blocks)


def estimated_bytes(listing: Listing, side: int) -> int:
    """How large the cache of a listing is about, by the sizes of a sample of its images."""
    sample = np.unique(np.linspace(0, len(listing) - 1, _SAMPLED).astype(int)).tolist()
    sizes = []
    for number in sample:
        with contextlib.suppress(UnreadableImageError):
            height, width = read_size(listing, number, side)
            sizes.append(3 * height * width)
    return int(np.mean(sizes or [0]) * len(listing))


def build_cache(
    path: Path,
    listing: Listing,
    made: Made,
    *,
    known_bad: frozenset[int],
    may_skip: bool,
    num_workers: int,
    progress: Progress,
    files: Files = LOCAL,
) -> dict[int, str]:
    """Write the cache at `path`, over an older one; why images could not be decoded, where that is allowed.

    Raises UnwrittenError where the disk has no room, before anything is written, and where it does not take it;
    DataError for the first image that cannot be decoded unless `may_skip`. Nothing is left then.
    """
    expected = estimated_bytes(listing, made.decode_size)
    free = files.free_bytes(path.parent)
    if expected * _ROOM > free:
        raise UnwrittenError(
            f"{path.parent}: the cache of {len(listing)} decoded images takes about {size_text(expected)}, and "
            f"{size_text(free)} are free. {CACHE_ADVICE}"
        )
    log.info("decoding %d images into %s: about %s", len(listing), path, size_text(expected))
    with placed(path, CACHE_ADVICE, files) as file:
        return _write(file, listing, made, known_bad, may_skip, num_workers, progress)


def _write(
    file: WriteHandle,
    listing: Listing,
    made: Made,
    known_bad: frozenset[int],
    may_skip: bool,
    num_workers: int,
    progress: Progress,
) -> dict[int, str]:
    head, offset = made.head(), made.pixels_start()
    index_N = np.zeros(made.num_images, ENTRY)
    reasons: dict[int, str] = {}
    task, tasks = Decode(listing, made.decode_size, known_bad), tasks_of(len(listing), made.decode_size)
    file.write(bytes(offset))
    with contextlib.closing(answers(task, tasks, num_workers)) as results:
        for numbers, ((sizes, found), data) in zip(tasks, results, strict=True):
            for number in found.keys() - known_bad if not may_skip else ():
                raise unreadable(listing, number, found[number])
            reasons |= {number: why for number, why in found.items() if number not in known_bad}
            for number, (height, width, checksum) in zip(numbers, sizes, strict=True):
                index_N[number] = (offset, height, width, checksum)
                offset += 3 * height * width
            file.write(data)
            progress("decoding images", numbers.stop, len(listing))
    file.write_at(0, head + index_N.tobytes() + head_digest(head, index_N))
    return reasons
