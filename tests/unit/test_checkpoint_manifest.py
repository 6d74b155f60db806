from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import ToyState, open_manager, request

from dino_exp.checkpoint.canonical import canonical_json, metrics_from_json, metrics_to_json, seal, unseal
from dino_exp.checkpoint.digests import state_digest
from dino_exp.checkpoint.layout import (
    PackName,
    is_leftover,
    manifest_name,
    parse_manifest_name,
    parse_pack_name,
    temporary_name,
    trash_name,
)
from dino_exp.checkpoint.manifest import Manifest, closure, manifest_to_bytes
from dino_exp.checkpoint.manifest_parse import MAX_DEPTH, parse_manifest
from dino_exp.checkpoint.pins import load_pins, save_pins
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    manager = open_manager(tmp_path_factory.mktemp("checkpoints"))
    metrics = {"knn_top1": 0.5, "val_loss": math.nan, "a": math.inf, "b": -math.inf}
    manager.save(ToyState(3), request(3, metrics=metrics))
    manifest = manager.drain()
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def body(manifest: Manifest) -> dict[str, Any]:
    return unseal(manifest_to_bytes(manifest), "manifest")


def test_a_manifest_reads_back_as_it_was(manifest: Manifest) -> None:
    again = parse_manifest(manifest_to_bytes(manifest), "manifest")
    assert manifest_to_bytes(again) == manifest_to_bytes(manifest)
    assert again.tensors == manifest.tensors
    assert math.isnan(again.metrics["val_loss"])
    assert again.metrics["b"] == -math.inf


def test_numbers_that_json_lacks_are_texts(body: dict[str, Any]) -> None:
    assert body["metrics"] == {"knn_top1": 0.5, "val_loss": "nan", "a": "inf", "b": "-inf"}


def test_the_digest_is_that_of_the_canonical_text_without_it(manifest: Manifest) -> None:
    """What another program does to check a manifest."""
    found = json.loads(manifest_to_bytes(manifest))
    digest = found.pop("digest")
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_newer_format_is_not_damage(body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFormatError, match="format 3, expected at most 2"):
        parse_manifest(seal(body | {"format_version": 3, "tensors": "something else"}), "manifest")


def test_unknown_keys_are_ignored(body: dict[str, Any], manifest: Manifest) -> None:
    assert parse_manifest(seal(body | {"later": [1]}), "manifest").tensors == manifest.tensors


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        *way, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
        for part in way:
            body = body[part]
        body[last] = value

    return change


WEIGHT = "tensors/student.weight"
HOSTILE = {
    "escaping pack": at("packs/0/name", "../../etc/passwd"),
    "absolute pack": at("packs/0/name", "/etc/passwd"),
    "pack name with a newline": at("packs/0/name", "step-000000003.a001.r00000.safetensors\n"),
    "pack name in other digits": at("packs/0/name", "step-00000000٣.a001.r00000.safetensors"),
    "no pack": at("packs", []),
    "absurd pack": at("packs/0/bytes", 2**60),
    "header beyond the pack": at("packs/0/header_bytes", 10**9),
    "no header": at("packs/0/header_bytes", 0),
    "unknown pack": at(f"{WEIGHT}/chunks/0/pack", "step-000000009.a001.r00000.safetensors"),
    "escaping chunk": at(f"{WEIGHT}/chunks/0/pack", "../../etc/passwd"),
    "start in the header": at(f"{WEIGHT}/chunks/0/start", 0),
    "start beyond the end": at(f"{WEIGHT}/chunks/0/start", 10**9),
    "negative start": at(f"{WEIGHT}/chunks/0/start", -8),
    "absurd size": at(f"{WEIGHT}/chunks/0/stored_bytes", 2**62),
    "other size": at(f"{WEIGHT}/chunks/0/stored_bytes", 23),
    "boolean size": at(f"{WEIGHT}/chunks/0/stored_bytes", True),
    "float size": at(f"{WEIGHT}/chunks/0/stored_bytes", 24.0),
    "two digests": at(f"{WEIGHT}/chunks/0/content_digest", "0" * 32),
    "no digest": at(f"{WEIGHT}/chunks/0/stored_digest", ""),
    "shell codec": at(f"{WEIGHT}/chunks/0/codec", "raw/1; rm"),
    "no chunk": at(f"{WEIGHT}/chunks", []),
    "chunk outside": at(f"{WEIGHT}/chunks/0/offset", [1, 0]),
    "chunk of other dimensions": at(f"{WEIGHT}/chunks/0/shape", [6]),
    "other dtype": at(f"{WEIGHT}/dtype", "object"),
    "absurd shape": at(f"{WEIGHT}/shape", [2**40, 2**40]),
    "larger shape": at(f"{WEIGHT}/shape", [4, 3]),
    "negative shape": at(f"{WEIGHT}/shape", [-2, -3]),
    "many dimensions": at(f"{WEIGHT}/shape", [1] * 17),
    "long name": at("tensors/" + "a" * 1001, {}),
    "reserved name": at("tensors/__metadata__", {}),
    "tensor of another kind": at(WEIGHT, [1]),
    "no bases": at("underlying", None),
    "bases of another kind": at("underlying/chunks", {}),
    "negative content": at("content_bytes", -1),
    "other full digest": at("full_state_digest", "s1:zz"),
    "negative step": at("step", -1),
    "large step": at("step", 10**9),
    "text for a step": at("step", "3"),
    "no state": at("state", None),
    "no record": at("record", []),
    "long text": at("created_at", "a" * 10_000),
    "other reasons": at("reasons", [3]),
    "metric of another kind": at("metrics", {"loss": [1]}),
    "metric of another text": at("metrics", {"loss": "NaN"}),
    "boolean metric": at("metrics", {"loss": True}),
    "healthy in words": at("healthy", "yes"),
    "no schedule": at("schedule", {}),
    "impossible schedule": at("schedule/horizon_steps", 0),
    "other state digest": at("state_digest", "s1:zz"),
    "no format": at("format_version", None),
    "negative format": at("format_version", -1),
    "format 1 with keys of format 2": at("format_version", 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(name: str, body: dict[str, Any]) -> None:
    given_body = copy.deepcopy(body)
    HOSTILE[name](given_body)
    with pytest.raises(CorruptCheckpointError):
        parse_manifest(seal(given_body), "manifest")


def test_two_chunks_must_tile_the_tensor(body: dict[str, Any]) -> None:
    def halves(first_offset: list[int], second_offset: list[int]) -> Manifest:
        given_body = copy.deepcopy(body)
        (chunk,) = given_body["tensors"]["student.weight"]["chunks"]
        half = chunk | {"shape": [1, 3], "stored_bytes": 12}
        given_body["tensors"]["student.weight"]["chunks"] = [
            half | {"offset": first_offset},
            half | {"offset": second_offset},
        ]
        return parse_manifest(seal(given_body), "manifest")

    assert len(halves([0, 0], [1, 0]).tensors["student.weight"].chunks) == 2
    with pytest.raises(CorruptCheckpointError, match="overlap"):
        halves([0, 0], [0, 0])


def with_bases(body: dict[str, Any], *bases: dict[str, Any], top: dict[str, Any]) -> Manifest:
    """A tensor with `top` changed in its chunk, and bases that are that chunk with something changed."""
    given_body = copy.deepcopy(body)
    (chunk,) = given_body["tensors"]["student.weight"]["chunks"]
    given_body["tensors"]["student.weight"]["chunks"] = [chunk | {"codec": "delta/1"} | top]
    given_body["underlying"] = {"chunks": [chunk | {"codec": "delta/1"} | base for base in bases]}
    return parse_manifest(seal(given_body), "manifest")


def test_a_chunk_may_build_on_chunks_that_build_on_others(body: dict[str, Any]) -> None:
    manifest = with_bases(body, {"codec": "raw/1"}, {"bases": [0]}, {"bases": [0, 1]}, top={"bases": [2, 0]})
    (chunk,) = manifest.tensors["student.weight"].chunks
    assert closure(chunk, manifest.bases) == [0, 1, 2]
    assert parse_manifest(manifest_to_bytes(manifest), "manifest") == manifest


def test_chains_of_bases_are_capped(body: dict[str, Any]) -> None:
    def chain(length: int) -> Manifest:
        bases: list[dict[str, Any]] = [{"bases": [place - 1] if place else []} for place in range(length)]
        return with_bases(body, *bases, top={"bases": [length - 1]})

    chain(MAX_DEPTH)
    with pytest.raises(CorruptCheckpointError, match="deep"):
        chain(MAX_DEPTH + 1)


@pytest.mark.parametrize(
    ("bases", "top"),
    [
        pytest.param([], {"bases": [0]}, id="none there"),
        pytest.param([{}], {"bases": [-1]}, id="negative"),
        pytest.param([{}], {"bases": [True]}, id="no number"),
        pytest.param([{}], {"bases": [0] * 9}, id="many"),
        pytest.param([{}], {"bases": 0}, id="no list"),
        pytest.param([{"bases": [0]}], {}, id="itself"),
        pytest.param([{"bases": [1]}, {}], {}, id="a later one"),
        pytest.param([{"shape": [3, 2]}], {"bases": [0]}, id="another shape"),
        pytest.param([{"offset": [1, 0]}], {"bases": [0]}, id="another part"),
        pytest.param([{}], {"bases": [0], "codec": "raw/1"}, id="raw with a base"),
        pytest.param([{"pack": "step-000000009.a001.r00000.safetensors"}], {}, id="another pack"),
        pytest.param([{"codec": "raw/1", "content_digest": "0" * 32}], {}, id="two digests"),
        pytest.param([], {"base": {"pack": "../base"}}, id="of format 1"),
    ],
)
def test_hostile_bases_are_refused(body: dict[str, Any], bases: list[dict[str, Any]], top: dict[str, Any]) -> None:
    with_bases(body, {}, top={"bases": [0]})
    with pytest.raises(CorruptCheckpointError):
        with_bases(body, *bases, top=top)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_of_a_value_is_refused_or_read(data: st.DataObject, body: dict[str, Any]) -> None:
    """Fuzz with a valid seal: whatever a stranger writes gives a manifest or a typed error, never anything else."""
    given_body = copy.deepcopy(body)
    part: Any = given_body
    while True:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else list(range(len(part)))))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20)
        | st.lists(st.integers(), max_size=3)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    )
    with contextlib.suppress(CorruptCheckpointError, UnsupportedFormatError):
        parse_manifest(seal(given_body), "manifest")


def test_a_manifest_under_another_name_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "step-000000009.json").write_bytes(manifest_to_bytes(manifest))
    with pytest.raises(CorruptCheckpointError, match="describes step 3, expected 9"):
        Store(tmp_path).read(9)


def test_a_manifest_of_2_gb_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "step-000000001.json").open("wb") as handle:
        handle.truncate(2 << 30)
    with pytest.raises(CorruptCheckpointError, match="expected at most"):
        Store(tmp_path).read(1)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "", '{"digest":"' + "0" * 64 + '"}\n', "\n" * 500])
def test_what_is_not_sealed(text: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        unseal(text.encode(), "file")


def test_a_sealed_list_of_lists_is_bounded() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(CorruptCheckpointError, match="nested"):
        unseal(seal({"deep": deep}), "file")


@given(st.dictionaries(st.text(min_size=1), st.floats(), max_size=5))
def test_metrics_go_through_json(metrics: dict[str, float]) -> None:
    again = metrics_from_json(json.loads(canonical_json(metrics_to_json(metrics))), "test")
    assert all(again[name] == value or math.isnan(value) for name, value in metrics.items())


@given(st.builds(PackName, *(st.integers(0, 10**digits - 1) for digits in (9, 6, 5, 6))))
def test_names_go_both_ways(pack: PackName) -> None:
    step = pack.step
    assert parse_manifest_name(manifest_name(step)) == step
    assert parse_pack_name(str(pack)) == pack
    assert is_leftover(temporary_name(manifest_name(step)))
    assert is_leftover(trash_name(step))
    assert not is_leftover(manifest_name(step))


@pytest.mark.parametrize(
    "name",
    [
        *("old-step-000000005.json.bak", "step-5.json", "step-000000005.json\n", "step-٠٠٠٠٠٠٠٠٥.json"),
        *("step-000000005.a0003.r00000.safetensors", "step-000000005.a003.r000000.safetensors"),
        *("step-000000005.a003.r00000.g000.safetensors", "step-000000005.a003.r00000.g0001.safetensors"),
        *("tmp", "", "../a"),
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_manifest_name(name) is None
    assert parse_pack_name(name) is None
    assert not is_leftover(name)


def test_the_state_digest_ignores_the_order_and_sees_the_rest() -> None:
    one, two = ("a", "float32", (2,), "0" * 32), ("b", "int64", (), "1" * 32)
    reference = state_digest([one, two], {"x": 1, "y": 2})
    assert state_digest([two, one], {"y": 2, "x": 1}) == reference
    others = [
        state_digest([one], {"x": 1, "y": 2}),
        state_digest([one, two], {"x": 1, "y": 3}),
        state_digest([one, ("b", "int32", (), "1" * 32)], {"x": 1, "y": 2}),
        state_digest([one, ("b", "int64", (1,), "1" * 32)], {"x": 1, "y": 2}),
        state_digest([one, ("c", "int64", (), "1" * 32)], {"x": 1, "y": 2}),
    ]
    assert len({reference, *others}) == 6


def test_a_manifest_without_whole_tensors_needs_no_digest(manifest: Manifest) -> None:
    data = manifest_to_bytes(replace(manifest, state_digest=None))
    assert parse_manifest(data, "manifest").state_digest is None


def test_pins_go_both_ways_and_notice_damage(tmp_path: Path) -> None:
    assert load_pins(tmp_path) == {}
    save_pins(tmp_path, {120: "for the paper", 3: ""})
    assert load_pins(tmp_path) == {120: "for the paper", 3: ""}
    data = (tmp_path / "pins.json").read_bytes()
    for index in range(len(data)):
        (tmp_path / "pins.json").write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(CorruptCheckpointError, match="Put it back"):
            load_pins(tmp_path)
    (tmp_path / "pins.json").write_bytes(seal({"pins": {"../x": "note"}}))
    with pytest.raises(CorruptCheckpointError):
        load_pins(tmp_path)
