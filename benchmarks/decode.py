"""What decoding an image costs, by ways to do it, and what a cache saves. One core, made pictures with grain.

`python -m benchmarks.decode` prints two tables: ways to decode a JPEG (in brackets the error against decoding and
reducing the whole: the root of the mean square, of 255 levels), and images a second through the data set, with and
without a cache. On a shared core of a server, Pillow 13 and libjpeg-turbo 3.2, the way taken needs 4.7 ms for a picture
of 1024 x 768 at side 512 where the whole needs 13.8, and 14 ms for one of 2048 x 1536 where the whole needs 51; half a
scale more is nearly as slow as the whole, and a box filter is off by 9 levels and more where the scale does not fit.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import parser_of
from dino_exp.build import Preparation, build_data
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.datasets import Dataset
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.decode import decode

SIDES = (512, 256)
SIZES = ((500, 375), (1024, 768), (2048, 1536), (4000, 3000))
NUM_IMAGES = 200
_TRIES = 5


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with soft shapes and grain, about as large as a camera's."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8))
    shapes = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grainy = (shapes + rng.integers(-12, 13, shapes.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=88)
    return file.getvalue()


def whole(data: bytes, side: int, gap: float | None = None) -> np.ndarray:
    """Decoded in full, then reduced."""
    with Image.open(io.BytesIO(data)) as image:
        longest = max(image.size)
        size = image.size if longest <= side else tuple(max(1, round(one * side / longest)) for one in image.size)
        made = image.convert("RGB")
        return np.asarray(made if made.size == size else made.resize(size, Image.Resampling.BICUBIC, reducing_gap=gap))


def scaled(data: bytes, side: int, filter: Image.Resampling, finer: int) -> np.ndarray:  # noqa: A002
    """Decoded at the smallest scale that gives `finer` times the wanted size, then reduced."""
    with Image.open(io.BytesIO(data)) as image:
        longest = max(image.size)
        size = image.size if longest <= side else tuple(max(1, round(one * side / longest)) for one in image.size)
        image.draft("RGB", (size[0] * finer, size[1] * finer))
        made = image.convert("RGB")
        return np.asarray(made if made.size == size else made.resize(size, filter))


WAYS: dict[str, Callable[[bytes, int], np.ndarray]] = {
    "whole, bicubic": whole,
    "whole, gap 2": lambda data, side: whole(data, side, 2.0),
    "scale, bicubic": lambda data, side: scaled(data, side, Image.Resampling.BICUBIC, 1),
    "scale / 2, bicubic": lambda data, side: scaled(data, side, Image.Resampling.BICUBIC, 2),
    "scale, box": lambda data, side: scaled(data, side, Image.Resampling.BOX, 1),
    "as taken": lambda data, side: decode(data, side).transpose(1, 2, 0),
}


def milliseconds(call: Callable[[], object]) -> float:
    """The best of a few tries."""
    best = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def ways_table() -> None:
    print("| image | side | " + " | ".join(WAYS) + " |\n|---|---|" + "---|" * len(WAYS))
    for size in SIZES:
        data = photograph(*size)
        for side in SIDES:
            expected = whole(data, side).astype(float)
            cells = []
            for way in WAYS.values():
                error = float(np.sqrt(((way(data, side) - expected) ** 2).mean()))
                cells.append(f"{milliseconds(partial(way, data, side)):.1f} ms ({error:.1f})")
            print(f"| {size[0]} x {size[1]}, {len(data) // 1000} kB | {side} | " + " | ".join(cells) + " |", flush=True)


def images_per_sec(dataset: Dataset) -> float:
    ids = np.random.default_rng(0).permutation(len(dataset))
    best = milliseconds(lambda: [dataset.images(ids[start : start + 32]) for start in range(0, len(ids), 32)])
    return 1000 * len(ids) / best


def cache_table() -> None:
    print("\n| images | side | decoded | from the cache | checksums, share of that |\n|---|---|---|---|---|")
    for size in ((500, 375), (1024, 768)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "images"
            folder.mkdir()
            for number in range(NUM_IMAGES):
                (folder / f"{number}.jpg").write_bytes(photograph(*size, seed=number))
            for side in (512, 224):
                found = [built(folder, side, cache) for cache in (False, True)]
                plain, cached = (images_per_sec(dataset) for dataset in found)
                share = checksum_secs(found[1]) / (len(found[1]) / cached)
                print(
                    f"| {size[0]} x {size[1]} | {side} | {plain:.0f} a second | {cached:.0f} a second | {share:.0%} |",
                    flush=True,
                )


def built(folder: Path, side: int, cache: bool) -> FilesDataset:
    data = FilesDataConfig(
        name="folder", root=str(folder), cache=cache, image_size=224, local_size=96, patch_size=16, digest=None,
        decode_size=side, labels="none", val_share=0.1, unreadable="refuse",
    )  # fmt: skip
    found = build_data(data, Preparation(cache=folder.parent / "cache")).train
    assert isinstance(found, FilesDataset)
    return found


def checksum_secs(dataset: FilesDataset) -> float:
    """Seconds for the checksums alone of all its images."""
    import xxhash

    assert dataset.canvases is not None
    blocks = [np.array(dataset.canvases.pixels(number)) for number in dataset.ids_N.tolist()]
    return milliseconds(lambda: [xxhash.xxh3_64_intdigest(block) for block in blocks]) / 1000


def main() -> None:
    parser_of(__doc__).parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ways_table()
    cache_table()


if __name__ == "__main__":
    main()
