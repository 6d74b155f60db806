"""Reading a manifest without its tensors: what an index does thousands of times, so they are not even parsed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_exp.checkpoint.canonical import canonical_json, parse_around, parse_object
from dino_exp.checkpoint.manifest import Chunk, Manifest, PackEntry, TensorEntry, manifest_to_bytes
from dino_exp.checkpoint.manifest_parse import parse_manifest
from dino_exp.checkpoint.types import Schedule, UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError

PACK = "step-000000003.a001.r00000.safetensors"
CHUNK = Chunk(
    offset=(0,),
    shape=(2,),
    pack=PACK,
    key="w",
    start=64,
    stored_bytes=8,
    codec="raw/1",
    stored_digest="0" * 32,
    content_digest="0" * 32,
)
TENSOR = TensorEntry(dtype="float32", shape=(2,), chunks=(CHUNK,))
MANIFEST = Manifest(
    step=3,
    epoch=1,
    samples_seen=96,
    created_at="2026-01-01T00:00:00.000+00:00",
    reasons=("end",),
    attempt=1,
    world_size=1,
    tensors={"tensors": TENSOR, "w": TENSOR, "world_size": TENSOR},
    bases=(CHUNK,),
    content_bytes=24,
    packs=(PackEntry(name=PACK, bytes=72, header_bytes=64, header_digest="1" * 32),),
    state={"loader.position": 3, 'a,"tensors":{"b': '},"world_size":7'},
    state_digest="s1:" + "2" * 64,
    record={"config_hash": "c1:a"},
    policy=[{"rule": "latest", "num": 3}],
    schedule=Schedule(8, 2),
)


def sealed(text: bytes) -> bytes:
    """A valid seal for any text that ends like an object: what a stranger can write."""
    return text[:-1] + b',"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def text_of(manifest: Manifest) -> bytes:
    data = manifest_to_bytes(manifest)
    return data[: data.rindex(b',"digest":')] + b"}"


def partial(text: bytes) -> Manifest:
    return parse_manifest(sealed(text), "manifest", with_tensors=False)


def test_everything_else_is_there() -> None:
    assert partial(text_of(MANIFEST)) == replace(MANIFEST, tensors={}, bases=())
    assert partial(text_of(replace(MANIFEST, tensors={}))) == replace(MANIFEST, tensors={}, bases=())


def test_the_tensors_are_not_parsed() -> None:
    text = text_of(MANIFEST)
    start, end = text.index(b',"tensors":{') + 12, text.rindex(b'},"world_size":')
    other = text[:start] + b"[" * 1000 + b'NaN "' + text[end:]
    assert partial(other) == replace(MANIFEST, tensors={}, bases=())
    with pytest.raises(CorruptCheckpointError):
        parse_manifest(sealed(other), "manifest")


@pytest.mark.parametrize("order", ["sorted", "reversed", "tensors first", "tensors last", "a key between", "in record"])
def test_other_layouts_are_read_rightly(order: str) -> None:
    """Whoever sealed it: policy and state digest, which may be absent, must not get lost behind the tensors."""
    body = json.loads(text_of(MANIFEST))
    hidden = {key: body.pop(key) for key in ("tensors", "policy", "state_digest", "underlying", "world_size")}
    match order:
        case "sorted":
            body |= hidden
            body = dict(sorted(body.items()))
        case "reversed":
            body |= hidden
            body = dict(sorted(body.items(), reverse=True))
        case "tensors first":
            body = hidden | body
        case "tensors last":
            body = body | dict(reversed(hidden.items()))
        case "a key between":
            body = {"a": 1} | body | hidden
        case "in record":
            body |= hidden
            body["record"] = {"config_hash": "c1:a", "tensors": {"x": {}}, "world_size": 1}
            body = dict(sorted(body.items()))
    expected = parse_manifest(sealed(json.dumps(body, separators=(",", ":")).encode()), "manifest")
    assert expected.policy == MANIFEST.policy
    for separators in ((",", ":"), (", ", ": ")):
        found = partial(json.dumps(body, separators=separators).encode())
        assert found == replace(expected, tensors={}, bases=())


def test_a_newer_format_and_damage_are_told_as_ever() -> None:
    body = json.loads(text_of(MANIFEST))
    with pytest.raises(UnsupportedFormatError, match="format 3"):
        partial(canonical_json(body | {"format_version": 3}))
    with pytest.raises(CorruptCheckpointError, match="manifest: step is -3, expected 0 to"):
        partial(canonical_json(body | {"step": -3}))
    with pytest.raises(CorruptCheckpointError, match="tensors is '3', expected dict"):
        parse_manifest(sealed(canonical_json(body | {"tensors": 3})), "manifest")
    with pytest.raises(CorruptCheckpointError, match="digest at its end"):
        parse_manifest(sealed(text_of(MANIFEST)).replace(b"loader", b"loadeR"), "manifest", with_tensors=False)


words = st.sampled_from(["t", "n", "a", ',"t":{', '},"n":', '"', "\\", "{", "}", '\\"', "tn"])
values = st.recursive(
    st.none() | st.integers(0, 3) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(words, values, max_size=5), values, values)
@settings(deadline=None)
def test_what_is_cut_out_is_the_entry_and_nothing_else(body: dict[str, Any], big: Any, small: Any) -> None:
    """Keys, strings and nested objects that look like the places of the cuts, in any order."""
    body |= {"t": big, "n": small}
    text = json.dumps(body, separators=(",", ":")).encode()
    with contextlib.suppress(CorruptCheckpointError):
        found = parse_around(text, "t", "n", "test")
        assert all(found[key] == body[key] for key in found)
        names = list(body)
        assert found.keys() == {*names} - {*names[names.index("t") : names.index("n")]}


@given(st.text(alphabet='{}[]":,tn\\1 ', max_size=60), st.text(alphabet='{}[]":,tn\\1 ', max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_is_read_otherwise_than_by_the_whole_parser(before: str, behind: str) -> None:
    text = f'{{"a":1{before},"t":{{{behind}}},"n":1{behind}}}'.encode()
    try:
        whole = parse_object(text, "test")
    except CorruptCheckpointError:
        return
    with contextlib.suppress(CorruptCheckpointError):
        found = parse_around(text, "t", "n", "test")
        assert "t" not in found
        assert all(whole[key] == found[key] for key in found)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_change_of_a_value_gives_the_same_as_reading_all(data: st.DataObject) -> None:
    body = json.loads(text_of(MANIFEST))
    part: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else list(range(len(part)))))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(st.none() | st.integers() | st.text(max_size=5) | st.just({}) | st.just([1]))
    text = canonical_json(body)
    with contextlib.suppress(CorruptCheckpointError, UnsupportedFormatError):
        whole = parse_manifest(sealed(text), "manifest")
        assert partial(text) == replace(whole, tensors={}, bases=())
