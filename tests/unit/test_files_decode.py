"""What becomes of the bytes of an image file, odd ones too."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw
from support.pictures import encoded, picture

from dino_exp.data.files.decode import MAX_PIXELS, UnreadableImageError, decode, decoder_name, stored_size

SIDE = 64


def seen(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_a_small_image_keeps_its_size_and_pixels(kind: str, options: dict[str, int]) -> None:
    pixels = decode(encoded(picture(), kind, **options), SIDE)
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 16, 24), np.uint8, True)
    assert np.abs(pixels.astype(int) - seen(picture())).mean() < (6 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(("size", "expected"), [((640, 320), (32, 64)), ((100, 333), (64, 19)), ((64, 64), (64, 64))])
def test_a_large_one_is_reduced_in_its_shape(kind: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encoded(picture(1, *size), kind)
    pixels = decode(data, SIDE)
    assert pixels.shape == (3, *expected)
    assert stored_size(data, SIDE) == expected
    quarter = pixels[:, : expected[0] // 4, : expected[1] // 4].mean(axis=(1, 2))
    assert np.abs(quarter - seen(picture(1))[:, 0, 0]).max() < 6


def test_decoding_at_a_smaller_scale_is_near_to_reducing_the_whole() -> None:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((1280, 960), Image.Resampling.BICUBIC)
    data = encoded(rough, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as whole:
        expected = seen(whole.resize((256, 192), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(data, 256) - expected).mean() < 2


def test_grey_becomes_three_equal_channels() -> None:
    for data in (encoded(picture(mode="L"), "PNG"), encoded(picture(mode="1"), "PNG")):
        pixels = decode(data, SIDE)
        assert (pixels[0] == pixels[1]).all()
        assert (pixels[0] == pixels[2]).all()
        assert pixels.max() > pixels.min()
    assert (decode(encoded(picture(mode="L"), "PNG"), SIDE) == seen(picture(mode="L"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_lies_on_white(mode: str, kind: str) -> None:
    image = picture(3).convert(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 12, 16))
    alpha.paste(128, (12, 0, 24, 8))
    image.putalpha(alpha)
    pixels = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), SIDE).astype(int)
    opaque = seen(picture(3).convert(mode).convert("RGB")).astype(int)
    assert (pixels[:, :, :12] == 255).all()
    assert (pixels[:, 8:, 12:] == opaque[:, 8:, 12:]).all()
    assert np.abs(pixels[:, :8, 12:] - (opaque[:, :8, 12:] + 255) / 2).max() <= 2


def test_palettes_with_and_without_a_transparent_colour() -> None:
    image = picture(4).quantize(8)
    assert (decode(encoded(image, "PNG"), SIDE) == seen(image)).all()
    index = image.getpixel((0, 0))
    pixels = decode(encoded(image, "PNG", transparency=index), SIDE)
    assert (pixels[:, 0, 0] == 255).all()
    assert (pixels[:, -1, -1] == seen(image)[:, -1, -1]).all()
    levels = bytes(0 if number == index else 255 for number in range(8))
    assert (decode(encoded(image, "PNG", transparency=levels), SIDE) == pixels).all()


def test_a_transparent_colour_without_a_palette() -> None:
    image = picture(4)
    pixels = decode(encoded(image, "PNG", transparency=image.getpixel((0, 0))), SIDE)
    assert (pixels[:, 0, 0] == 255).all()
    assert (pixels[:, -1, -1] == seen(image)[:, -1, -1]).all()


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(encoded(picture(5, mode="CMYK"), "JPEG", quality=98), SIDE).astype(int)
    assert np.abs(pixels - seen(picture(5)))[:, 2:6, 2:10].max() < 12


def test_of_16_bits_of_grey_the_upper_ones_are_kept() -> None:
    levels = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(levels), "PNG"), SIDE)
    assert (pixels == (levels >> 8)).all()
    assert pixels.max() == 255


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("size", [(24, 16), (300, 200)])
def test_the_camera_is_turned_upright(kind: str, size: tuple[int, int]) -> None:
    upright = picture(6, *size)
    turned = {
        1: upright, 2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True), 7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }  # fmt: skip
    plain = decode(encoded(upright, kind, quality=95), SIDE).astype(int)
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = decode(encoded(stored, kind, quality=95, exif=exif), SIDE)
        assert pixels.shape == plain.shape
        assert np.abs(pixels - plain).mean() < 8, orientation


def test_strange_notes_of_the_camera_are_no_reason() -> None:
    plain = encoded(picture(), "JPEG")
    for notes in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"):
        assert decode(encoded(picture(), "JPEG", exif=notes), SIDE).shape == decode(plain, SIDE).shape


def test_one_pixel_and_a_line() -> None:
    assert decode(encoded(picture(0, 1, 1), "PNG"), SIDE).shape == (3, 1, 1)
    assert decode(encoded(picture(0, 5000, 1), "PNG"), SIDE).shape == (3, 1, 64)
    assert decode(encoded(picture(0, 1, 5000), "JPEG"), SIDE).shape == (3, 64, 1)


def test_the_name_of_the_kind_does_not_matter_only_the_bytes() -> None:
    assert decode(encoded(picture(), "PNG"), SIDE).shape == (3, 16, 24)  # no name reaches the decoder
    with pytest.raises(UnreadableImageError, match=r"neither a JPEG, nor a PNG, nor a WebP"):
        decode(encoded(picture(), "BMP"), SIDE)


def test_of_an_animation_the_first_picture_is_taken() -> None:
    first, second = picture(7), picture(8)
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert (decode(data, SIDE) == seen(first)).all()


def test_of_a_jpeg_with_further_pictures_the_first_is_taken() -> None:
    """As cameras write them; Pillow calls it MPO."""
    first = picture(7)
    data = encoded(first, "MPO", save_all=True, append_images=[picture(8)], quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "MPO"
    assert (decode(data, SIDE) == decode(encoded(first, "JPEG", quality=95), SIDE)).all()


def test_every_flipped_bit_of_a_png_is_noticed() -> None:
    """Also those that leave as many bytes of pixels as there should be."""
    image = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(image).line((0, 0, 59, 39), "black", 3)
    data = encoded(image, "PNG")
    good = decode(data, SIDE)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(UnreadableImageError):
                decode(bytes(flipped), SIDE)
    for num in (1, 4, 11, 12, 13, 20):
        with pytest.raises(UnreadableImageError):
            decode(data[:-num], SIDE)
    assert (decode(data + b"more", SIDE) == good).all()


def png(depth: int, colour: int, transparent: bytes, line: bytes) -> bytes:
    """Two pixels side by side."""
    head = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    parts = {b"IHDR": head, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + line), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("depth", "colour", "transparent", "line", "second"),
    [
        (1, 0, b"\0\0", b"\x40", 255), (2, 0, b"\0\1", b"\x60", 170), (4, 0, b"\0\5", b"\x53", 51),
        (8, 0, b"\0\5", b"\5\7", 7), (16, 0, b"\x10\0", b"\x10\0\x20\0", 32),
        (8, 2, b"\0\1\0\2\0\3", b"\1\2\3\7\7\7", 7),
        (16, 2, b"\x10\0\x10\0\x10\0", b"\x10\0" * 3 + b"\x20\0" * 3, 32),
    ],
)  # fmt: skip
def test_a_transparent_colour_of_any_depth(
    depth: int, colour: int, transparent: bytes, line: bytes, second: int
) -> None:
    pixels = decode(png(depth, colour, transparent, line), SIDE)
    assert pixels.tolist() == [[[255, second]]] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [8, SIDE, 512])
def test_a_truncated_file_is_unreadable(kind: str, side: int) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)), kind)
    for share in (0.9, 0.5, 0.02):
        with pytest.raises(UnreadableImageError):
            decode(data[: int(len(data) * share)], side)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "it is empty"), (b"<html>", "neither a JPEG"), (random.Random(0).randbytes(5000), "neither")],
)
def test_what_is_no_image_is_unreadable(data: bytes, why: str) -> None:
    with pytest.raises(UnreadableImageError, match=why):
        decode(data, SIDE)


def test_flipped_bytes_raise_nothing_else() -> None:
    rng = random.Random(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(picture(2, 90, 70), kind)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert max(decode(bytes(data), SIDE).shape) <= SIDE
            except UnreadableImageError:
                continue


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG that claims to be so large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_bomb_is_told_and_not_decoded() -> None:
    with pytest.raises(UnreadableImageError, match=r"million pixels"):
        decode(bomb(30_000, 30_000), SIDE)
    most = MAX_PIXELS["PNG"] // 12_000
    with pytest.raises(UnreadableImageError, match=r"truncated|broken|unrecognized"):  # large, and no bomb: no warning
        decode(bomb(12_000, most), SIDE)
    with pytest.raises(UnreadableImageError, match=r"^it has 90 million pixels, expected at most 89 .* PNG: reduce it"):
        decode(bomb(12_000, most + 10), SIDE)


def test_16_bits_of_grey_take_little_memory() -> None:
    """A file of kilobytes, and 89 million pixels: 8 bytes for each would be too much for a worker."""
    levels = np.zeros((1000, 1000), np.uint16)
    data = encoded(Image.fromarray(levels), "PNG")
    tracemalloc.start()  # of NumPy's arrays
    try:
        decode(data, SIDE)
        assert tracemalloc.get_traced_memory()[1] < 8 * levels.size
    finally:
        tracemalloc.stop()


def test_want_of_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError

    data = encoded(picture(), "PNG")
    monkeypatch.setattr(Image.Image, "load", too_large)
    with pytest.raises(MemoryError):
        decode(data, SIDE)


def test_the_decoder_names_the_versions_that_make_the_pixels() -> None:
    assert "Pillow" in decoder_name()
    assert decoder_name() == decoder_name()
