"""What every codec must do, whatever the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.checkpoint.codec import CODECS, Codec, find_codec
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


@every_codec
@given(data=st.binary(max_size=512), item_bytes=st.sampled_from([1, 2, 4, 8]))
def test_decoding_gives_back_what_was_encoded(codec: Codec, data: bytes, item_bytes: int) -> None:
    content = data[: len(data) // item_bytes * item_bytes]
    before = bytes(content)
    stored = bytes(codec.encode(memoryview(content), item_bytes, None))
    into = bytearray(len(content))
    codec.decode(memoryview(stored), item_bytes, None, memoryview(into))
    assert into == content == before


@every_codec
@given(data=st.binary(min_size=8, max_size=64))
def test_too_few_or_too_many_bytes_are_damage(codec: Codec, data: bytes) -> None:
    stored = bytes(codec.encode(memoryview(data), 1, None))
    for wrong in (stored[:-1], stored + b"\0"):
        with pytest.raises(CorruptCheckpointError):
            codec.decode(memoryview(wrong), 1, None, memoryview(bytearray(len(data))))


@every_codec
def test_codecs_are_found_by_name_and_version(codec: Codec) -> None:
    assert find_codec(codec.name) is codec
    assert codec.name.rpartition("/")[2].isdecimal()


def test_an_unknown_codec_is_not_damage() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"'delta/9' is unknown here, expected one of raw/1"):
        find_codec("delta/9")
