"""From the bytes of a JPEG, PNG or WebP file to pixels: a pure function of the bytes, for one version of Pillow.

Shapes: 3 channels (red, green, blue), H x W pixels.
"""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from dino_exp.errors import DataError

MAX_PIXELS = {"JPEG": 178_956_970, "PNG": 89_478_485, "WEBP": 89_478_485}
"""Of more pixels a file of kilobytes fills the memory. Where Pillow sees an attack; half of it for the kinds that can
only be decoded as a whole, which takes up to 24 bytes a pixel."""
DECODER_VERSION = 2  # of the pixels: part of a data set's fingerprint
REFUSALS_VERSION = 2  # of what is unreadable: another one makes lists and caches anew
_PAPER = (255, 255, 255)  # what shows through transparent pixels, as in a browser
_GAP = 2.0  # averages whole pixels down to twice the wanted size first, where an image is far larger

_ORIENTATION = 0x0112  # of EXIF
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # where the first chunk says the bits of a sample
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]


class UnreadableImageError(DataError):
    """The bytes are no image that can be decoded. The message is the reason, without the name of the file."""


def decoder_name() -> str:
    """The decoder and the versions of what it decodes with: other ones may give other pixels."""
    parts = {name: features.version(name) for name in ("libjpeg_turbo", "jpg", "webp")}
    words = [f"{name} {version}" for name, version in parts.items() if version]
    return f"{DECODER_VERSION}.{REFUSALS_VERSION} (Pillow {PIL.__version__}, {', '.join(words)})"


def decode(data: bytes, side: int) -> Pixels:
    """The first image in `data`, (3, H, W): upright, in RGB, and reduced to H, W <= `side` where it is larger.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) that is not too small, and reduced from there
    with antialiasing (bicubic). Transparent pixels lie on white; of 16 bits the upper ones are kept; a
    colour profile is not applied. Raises UnreadableImageError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it copes with: strange EXIF, large images
        try:
            with Image.open(io.BytesIO(data), formats=tuple(MAX_PIXELS)) as image:
                kind = _kind_of(image)
                _refuse_too_large(image, kind)
                if kind == "PNG":
                    _check_png(data)
                    _scale_transparent_colour(image, data)
                return _pixels(image, side)
        except Image.DecompressionBombError as problem:  # of Pillow's own limit, before it says which kind it is
            raise UnreadableImageError(
                f"it has more than {max(MAX_PIXELS.values()) / 1e6:.0f} million pixels: reduce it"
            ) from problem
        except PIL.UnidentifiedImageError as problem:
            what = "it is empty" if not data else "it is neither a JPEG, nor a PNG, nor a WebP image"
            raise UnreadableImageError(what) from problem
        except (UnreadableImageError, MemoryError):  # want of memory is of this machine, and not of the image
            raise
        except Exception as problem:  # of hostile bytes Pillow raises nearly anything
            raise UnreadableImageError(f"{type(problem).__name__}: {problem}"[:300]) from problem


def stored_size(data: bytes, side: int) -> tuple[int, int]:
    """Height and width that `decode` gives, before it turns the image, from the head of the file alone.

    Raises UnreadableImageError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=tuple(MAX_PIXELS)) as image:
                width, height = _wanted(image.size, side)
                return height, width
        except Exception as problem:
            raise UnreadableImageError(str(problem)[:300]) from problem


def _kind_of(image: Image.Image) -> str:
    """One of the three; a JPEG with further pictures in it, as cameras write them, has a name of its own."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def _refuse_too_large(image: Image.Image, kind: str) -> None:
    num, most = image.size[0] * image.size[1], MAX_PIXELS[kind]
    if num > most:
        raise UnreadableImageError(
            f"it has {num / 1e6:.0f} million pixels, expected at most {most / 1e6:.0f} million in a {kind}: reduce it"
        )


def _check_png(data: bytes) -> None:
    """Compare the checksums of a PNG's chunks, which Pillow does not do with those of the pixels.

    Source: PNG specification, third edition, 5.3: length, type, content, CRC of type and content.
    """
    at, kind = len(_PNG_HEAD), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data):
            raise UnreadableImageError("it is cut off")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise UnreadableImageError(f"it is damaged: the checksum of its {kind!r} does not fit")
        at = end + 4


def _scale_transparent_colour(image: Image.Image, data: bytes) -> None:
    """The colour that a PNG calls transparent, in levels of a byte, as Pillow has the pixels and not the colour.

    Of 16 bits the upper ones: all colours that look alike are transparent. Grey of 16 bits is left as it is.
    """
    colour, depth = image.info.get("transparency"), data[_PNG_DEPTH]
    if isinstance(colour, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    if isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _wanted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The largest size of the same shape whose sides are at most `side`; never a larger one."""
    longest = max(size)
    if longest <= side:
        return size
    width, height = (max(1, (2 * one * side + longest) // (2 * longest)) for one in size)
    return width, height


def _pixels(image: Image.Image, side: int) -> Pixels:
    wanted = _wanted(image.size, side)
    if wanted != image.size:
        image.draft(None, wanted)  # of JPEG only
    upright = _rgb(image)
    if upright.size != wanted:
        upright = upright.resize(wanted, Image.Resampling.BICUBIC, reducing_gap=_GAP)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        upright = upright.transpose(turn)
    return np.ascontiguousarray(np.asarray(upright, np.uint8).transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    """How the camera was held; 1 is upright, and what is taken where nothing sensible is said."""
    try:
        said = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - whatever is wrong with what the camera noted, the picture is there
        return 1
    return said if isinstance(said, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        levels = np.asarray(image)
        if levels.dtype.itemsize > 2:
            levels = levels.clip(0, 65535)
        shown = (levels >> 8).astype(np.uint8)
        shown[levels == image.info.get("transparency", -1)] = _PAPER[0]
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        picture = _in(image, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_PAPER, 255)), picture).convert("RGB")
    return _in(image, "RGB")


def _in(image: Image.Image, mode: str) -> Image.Image:
    """The same in another mode; itself, where Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)
