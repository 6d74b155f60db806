"""Small picture files, made by formula: colours that compression keeps apart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_exp.data.files import listing as module
from dino_exp.data.files.listing import Listing, current_listing


def picture(seed: int = 0, width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    """Four flat quarters of random colours, of a seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    rows = colours.repeat(-(-height // 2), 0).repeat(-(-width // 2), 1)[:height, :width]
    return Image.fromarray(rows).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file of the kind JPEG, PNG or WEBP."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def small_tree(root: Path, num: int = 12, classes: str = "abc") -> Path:
    """`num` pictures of all three kinds, of different sizes, in a folder for each class."""
    kinds = (("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP"))
    for number in range(num):
        ending, kind = kinds[number // len(classes) % 3]
        folder = root / classes[number % len(classes)]
        write(folder / f"{number:03d}.{ending}", encoded(picture(number, 20 + number, 30 - number % 7), kind))
    return root


def listing_of(root: Path) -> Listing:
    """Walked anew, whatever this process has seen."""
    module._last.clear()
    return current_listing(str(root))
