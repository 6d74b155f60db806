"""Blocks of words: what is left of them comes back, on any processor, and from any stranger's bytes nothing else."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_exp.checkpoint.blocks import decode_block, encode_block
from dino_exp.checkpoint.choosing import Choice, choose
from dino_exp.checkpoint.planes import WORD_TYPES, Words, pack_planes, unpack_planes
from dino_exp.checkpoint.residuals import Way, add, predict, subtract
from dino_exp.errors import CorruptCheckpointError

widths = st.sampled_from([1, 2, 4, 8])
SMALL = settings(max_examples=150, deadline=None)


def words(width: int, num: int, seed: int) -> Words:
    data = np.random.default_rng(seed).integers(0, 256, num * width, dtype=np.uint8)
    return data.view(WORD_TYPES[width])


def floats(*values: float) -> Words:
    return np.array(values, "<f4").view("<u4")


@given(width=widths, num=st.integers(0, 300), seed=st.integers(0, 10**6))
@SMALL
def test_planes_come_back(width: int, num: int, seed: int) -> None:
    given_words = words(width, num, seed)
    if seed % 2:
        given_words = given_words & given_words.dtype.type(0x0F)
    stored = memoryview(b"".join(pack_planes(given_words)))
    found = np.empty_like(given_words)
    unpack_planes(stored, found)
    assert (found == given_words).all()


@given(width=widths, num=st.integers(1, 300), seed=st.integers(0, 10**6), way=st.sampled_from(list(Way)))
@SMALL
def test_every_way_there_and_back(width: int, num: int, seed: int, way: Way) -> None:
    if way == Way.LINEAR:
        width = 4
    own, others = words(width, num, seed), [words(width, num, seed + n) for n in range(1, 4)]
    for place, value in enumerate((0x7FC0_0001, 0x8000_0000, 1, 0xFF80_0000)[: num if width == 4 else 0]):
        own[place] = others[0][place] = value
    weights = [0.3, 0.5, -1.7]
    left = subtract(way, own, others, weights)
    assert left.dtype == own.dtype
    assert (add(way, left, others, weights) == own).all()


def test_small_differences_either_way_are_small_words() -> None:
    base = np.full(5, 1 << 20, "<u4")
    own = base + np.array([0, 1, 2, 0, 0], "<u4") - np.array([0, 0, 0, 1, 2], "<u4")
    assert subtract(Way.DIFFERENCE, own, [base]).tolist() == [0, 2, 4, 1, 3]


def test_a_prediction_needs_and_makes_normal_numbers_only() -> None:
    """What libraries may switch off for a whole thread cannot change what was predicted."""
    tiny, huge = 1e-40, 3e38
    others = [floats(tiny, huge, 1.0, np.nan, 4e-38), floats(1.0, huge, np.inf, 1.0, 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = predict(others, [0.5, 0.5])
        torch.set_flush_denormal(True)
        try:
            during = predict(others, [0.5, 0.5])
        finally:
            torch.set_flush_denormal(False)
    assert (before == during).all()
    assert before.view("<f4").tolist() == [0.5, float(np.float32(huge)), 0.5, 0.5, 0.0]
    assert predict([floats(huge, -huge)], [4.0]).view("<f4").tolist() == [np.inf, -np.inf]


def test_a_second_moment_is_predicted_from_what_it_forgets() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1e-3, 4096).astype("<f4") ** 2
    after = before * np.float32(0.978) + (rng.random(4096) < 0.05) * np.float32(1e-7)
    chosen = choose(after.view("<u4"), [before.view("<u4")], "float32", [(0,)])
    assert chosen.way == Way.LINEAR
    assert chosen.weights[0] == pytest.approx(0.978, abs=1e-4)
    assert chosen.share < 0.2


def test_an_average_is_predicted_from_itself_and_what_it_averages() -> None:
    rng = np.random.default_rng(0)
    old, student_before = rng.normal(0, 0.02, 4096), rng.normal(0, 0.02, 4096)
    student = student_before + rng.normal(0, 1e-3, 4096)
    new = (0.8 * old + 0.15 * student + 0.05 * student_before).astype("<f4")
    others = [array.astype("<f4").view("<u4") for array in (old, student, student_before)]
    chosen = choose(new.view("<u4"), others, "float32", [(0,), (1,), (0, 1, 2)])
    assert chosen.way == Way.LINEAR
    assert chosen.weights == pytest.approx((0.8, 0.15, 0.05), abs=1e-3)


def test_noise_is_left_alone() -> None:
    noise, other = words(4, 4096, 1), words(4, 4096, 2)
    assert choose(noise, [other], "int32", [(0,)]).way == Way.PLAIN
    assert choose(np.zeros(3, "<u4"), [], "float32", []).way == Way.TURNED


def encoded(way: Way = Way.DIFFERENCE, needs: tuple[int, ...] = (0,), weights: tuple[float, ...] = ()) -> bytes:
    """A block of 8 float32 words, without its length."""
    own, others = floats(*range(8)), [floats(*range(1, 9)), floats(*range(2, 10))]
    return b"".join(encode_block(own, others, Choice(way, needs, weights)))[4:]


HOSTILE = {
    "nothing": b"",
    "half a head": b"\x00",
    "an unknown way": b"\x09\x01" + encoded()[2:],
    "a base that is not there": b"\x03\x04" + encoded()[2:],
    "two bases for one": b"\x03\x03" + encoded()[2:],
    "no base for one": b"\x03\x00" + encoded()[2:],
    "a base for none": b"\x00\x01" + encoded()[2:],
    "no weights": b"\x04\x01",
    "a weight that is no number": b"\x04\x01" + struct.pack("<d", float("nan")) + encoded()[2:],
    "an endless weight": b"\x04\x01" + struct.pack("<d", float("inf")) + encoded()[2:],
    "a large weight": b"\x04\x01" + struct.pack("<d", 1e300) + encoded()[2:],
    "one byte less": encoded()[:-1],
    "one byte more": encoded() + b"\0",
    "an endless plane": encoded()[:2] + struct.pack("<I", 2**31 - 1) + encoded()[6:],
    "an endless plane as it is": encoded()[:2] + struct.pack("<I", 2**32 - 1) + encoded()[6:],
    "no zstd frame": encoded()[:2] + struct.pack("<I", 4) + b"abcd" + encoded()[6:],
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_blocks_are_refused(data: bytes) -> None:
    others = [floats(*range(1, 9)), floats(*range(2, 10))]
    with pytest.raises(CorruptCheckpointError):
        decode_block(memoryview(data), others, "float32", np.empty(8, "<u4"))


def test_a_frame_that_would_inflate_without_end_is_refused() -> None:
    bomb = b"".join(pack_planes(np.zeros(1 << 22, "<u1")))
    data = bytes([Way.PLAIN, 0]) + bomb
    with pytest.raises(CorruptCheckpointError, match="not of 8 bytes"):
        decode_block(memoryview(data), [], "uint8", np.empty(8, "<u1"))


def test_linear_blocks_are_for_float32_only() -> None:
    data = encoded(Way.LINEAR, (0,), (1.0,))
    decode_block(
        memoryview(data), [floats(*range(1, 9)), floats(*range(2, 10))], "float32", found := np.empty(8, "<u4")
    )
    assert (found == floats(*range(8))).all()
    with pytest.raises(CorruptCheckpointError):
        decode_block(memoryview(data), [floats(*range(1, 9))] * 2, "int32", np.empty(8, "<u4"))


@given(data=st.binary(max_size=120))
@SMALL
def test_any_bytes_are_a_block_or_damage(data: bytes) -> None:
    others = [floats(*range(1, 9)), floats(*range(2, 10))]
    for start in (b"", b"\x00\x00", b"\x03\x01", b"\x04\x01"):
        try:
            decode_block(memoryview(start + data), others, "float32", np.empty(8, "<u4"))
        except CorruptCheckpointError:
            continue
