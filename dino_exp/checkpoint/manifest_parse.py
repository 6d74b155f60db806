"""Reading manifests that may be damaged, hostile, or from the future. Nothing is trusted before it is
bounded.

Every problem is a CorruptCheckpointError that says where, except a newer format, which is an
UnsupportedFormatError: such a file is not damaged, and must not be treated as such. Keys that this version
does not know are ignored.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations

from dino_exp.checkpoint.canonical import metrics_from_json, parse_around, parse_object, sealed_text
from dino_exp.checkpoint.codec_names import RAW
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.layout import MAX_STEP, is_pack_name
from dino_exp.checkpoint.manifest import (
    BASES_KEY,
    FORMAT_VERSION,
    Chunk,
    Manifest,
    PackEntry,
    TensorEntry,
    closure,
)
from dino_exp.checkpoint.types import JSON, Schedule, UnsupportedFormatError
from dino_exp.errors import ConfigError, CorruptCheckpointError

MAX_MANIFEST_BYTES = 64 << 20
MAX_TENSORS = 100_000
MAX_CHUNKS = 1_000  # of one tensor: about as many as ranks
MAX_BASES = 1_000_000
MAX_DEPTH = 64  # bases of bases
MAX_DIRECT_BASES = 8
_MAX_CONTENT_OF_A_BYTE = 100_000  # a block of a mebibyte has a head of some bytes at least
MAX_BYTES = 1 << 50
MAX_DIMS = 16
MAX_TEXT = 1_000

_CONTENT_DIGEST = re.compile(r"[0-9a-f]{32}")
_STATE_DIGEST = re.compile(r"s1:[0-9a-f]{64}")
_NEW_IN_2 = {"content_bytes", "full_state_digest"}
_OTHER_KEYS = Manifest.__dataclass_fields__.keys() - {"tensors", "bases"} - _NEW_IN_2
_CODEC = re.compile(r"[a-z0-9_+-]{1,40}/\d{1,3}")


def parse_manifest(data: bytes, what: str, *, with_tensors: bool = True) -> Manifest:
    """The manifest in the bytes of a file; for an index its tensors may be left out, which is most of the work.

    Then nobody looks at them beyond the digest that covers the whole file.
    Raises CorruptCheckpointError, UnsupportedFormatError.
    """
    text = sealed_text(data, what)
    if not with_tensors:
        with contextlib.suppress(CorruptCheckpointError, UnsupportedFormatError):
            return _parse_without_tensors(text, what)
    # Also after that failed: the file may be laid out in another way, and this finds out what is wrong with it.
    return _to_manifest(parse_object(text, what), what, with_tensors=with_tensors)


def _parse_without_tensors(text: bytes, what: str) -> Manifest:
    body = parse_around(text, "tensors", "world_size", what)
    # Of strict JSON, keys that are all here cannot be among those that were left out.
    _need(body.keys() >= _OTHER_KEYS, what, "keys are missing")
    _need(body.keys() >= _NEW_IN_2 or body["format_version"] == 1, what, "keys of format 2 are missing")
    return _to_manifest(body, what, with_tensors=False)


def _to_manifest(body: dict[str, JSON], what: str, *, with_tensors: bool) -> Manifest:
    version = _check_version(body, what)
    _need(version > 1 or not _NEW_IN_2 & body.keys(), what, "format 1 with keys of format 2")
    packs = {pack.name: pack for pack in (_pack(item, what) for item in _list(body, "packs", what))}
    _need(len(packs) == len(body["packs"]), what, "a pack comes twice")
    tensors = _dict(body, "tensors", what) if with_tensors else {}
    _need(len(tensors) <= MAX_TENSORS, what, f"{len(tensors)} tensors, expected at most {MAX_TENSORS}")
    bases = _bases(body, packs, what) if with_tensors and version > 1 else ()
    return Manifest(
        step=_whole(body, "step", what, MAX_STEP),
        epoch=_whole(body, "epoch", what, MAX_STEP),
        samples_seen=_whole(body, "samples_seen", what),
        created_at=_text(body, "created_at", what),
        reasons=_texts(body, "reasons", what),
        attempt=_whole(body, "attempt", what, 10**6 - 1),
        world_size=_whole(body, "world_size", what, 10**5),
        tensors={name: _tensor(name, entry, packs, bases, what) for name, entry in tensors.items()},
        bases=bases,
        content_bytes=_whole(body, "content_bytes", what) if version > 1 else _raw_bytes(packs.values()),
        packs=tuple(packs.values()),
        state=_dict(body, "state", what),
        state_digest=_state_digest(body, "state_digest", what),
        full_state_digest=_state_digest(body, "full_state_digest", what),
        record=_dict(body, "record", what),
        metrics=metrics_from_json(body.get("metrics"), f"{what}: metrics"),
        health=_dict(body, "health", what),
        healthy=_flag(body, "healthy", what),
        resumable=_flag(body, "resumable", what),
        aside=_dict(body, "aside", what),
        generators=tuple(_list(body, "generators", what)),
        policy=body.get("policy"),
        schedule=parse_schedule(body.get("schedule"), what),
        format_version=version,
    )


def _check_version(body: dict[str, JSON], what: str) -> int:
    version = _whole(body, "format_version", what)
    _need(version > 0, what, "there is no format 0")
    if version > FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"{what}: format {version}, expected at most {FORMAT_VERSION}; it is of a newer version, "
            "so install that one to read it"
        )
    return version


def _state_digest(body: dict[str, JSON], key: str, what: str) -> str | None:
    return None if body.get(key) is None else _matching(body, key, _STATE_DIGEST, what)


def parse_schedule(given: JSON, what: str) -> Schedule:
    """A recorded schedule. Raises CorruptCheckpointError."""
    _need(isinstance(given, dict), what, "schedule is no object")
    try:
        return Schedule(_whole(given, "horizon_steps", what), _whole(given, "steps_per_epoch", what))
    except ConfigError as problem:
        raise CorruptCheckpointError(f"{what}: {problem}") from problem


def _raw_bytes(packs: Iterable[PackEntry]) -> int:
    """The content of format 1, which knew no other codec."""
    return sum(pack.bytes - pack.header_bytes for pack in packs)


def _bases(body: dict[str, JSON], packs: dict[str, PackEntry], what: str) -> tuple[Chunk, ...]:
    given = _list(_dict(body, BASES_KEY, what), "chunks", f"{what}: {BASES_KEY}")
    _need(len(given) <= MAX_BASES, what, f"{len(given)} bases, expected at most {MAX_BASES}")
    bases: list[Chunk] = []
    depths: list[int] = []
    for place, item in enumerate(given):
        where = f"{what}: base {place}"
        bases.append(_chunk(item, packs, bases, where))  # only those before it: no circle
        depths.append(1 + max((depths[below] for below in bases[-1].bases), default=0))
        _need(depths[-1] <= MAX_DEPTH, where, f"bases {depths[-1]} deep, expected at most {MAX_DEPTH}")
    return tuple(bases)


def _tensor(name: str, given: JSON, packs: dict[str, PackEntry], bases: Sequence[Chunk], what: str) -> TensorEntry:
    where = f"{what}: tensor {name[:80]!r}"
    _need(0 < len(name) <= MAX_TEXT and name != "__metadata__", where, "not a tensor's name")
    dtype = _text(given, "dtype", where)
    _need(dtype in DTYPES, where, f"dtype {dtype[:40]!r}, expected one of {', '.join(DTYPES)}")
    shape = _shape(given, "shape", where)
    chunks = _list(given, "chunks", where)
    _need(1 <= len(chunks) <= MAX_CHUNKS, where, f"{len(chunks)} chunks, expected 1 to {MAX_CHUNKS}")
    entry = TensorEntry(dtype=dtype, shape=shape, chunks=tuple(_chunk(chunk, packs, bases, where) for chunk in chunks))
    most = math.prod(size or 1 for size in shape)  # also of an empty tensor, whose strides must be numbers too
    _need(
        most * DTYPES[dtype].item_bytes <= MAX_BYTES, where, f"shape {list(shape)}, expected at most {MAX_BYTES} bytes"
    )
    _check_tiling(entry, where)
    for chunk in entry.chunks:
        closure(chunk, bases)
        content = chunk.num_elements * DTYPES[dtype].item_bytes
        if chunk.codec == RAW:
            _need(chunk.stored_bytes == content, where, f"{chunk.stored_bytes} raw bytes, expected {content}")
        else:
            least = -(-content // _MAX_CONTENT_OF_A_BYTE)
            _need(chunk.stored_bytes >= least, where, f"{chunk.stored_bytes} stored bytes, expected at least {least}")
    return entry


def _chunk(given: JSON, packs: dict[str, PackEntry], bases: Sequence[Chunk], where: str) -> Chunk:
    pack = _text(given, "pack", where)
    _need(pack in packs, where, f"pack {pack[:80]!r} is not among the manifest's packs")
    start = _whole(given, "start", where)
    stored_bytes = _whole(given, "stored_bytes", where)
    inside = packs[pack].header_bytes <= start and start + stored_bytes <= packs[pack].bytes
    _need(inside, where, f"{stored_bytes} bytes at {start} do not lie in the {packs[pack].bytes} of its pack")
    places = _list(given, "bases", where) if "bases" in given else []
    _need(given.get("base") is None, where, "a base of format 1, which had none")
    known = len(places) <= MAX_DIRECT_BASES and all(type(at) is int and 0 <= at < len(bases) for at in places)
    _need(known, where, f"its bases are not at most {MAX_DIRECT_BASES} of those listed before it")
    chunk = Chunk(
        offset=_shape(given, "offset", where),
        shape=_shape(given, "shape", where),
        pack=pack,
        key=_text(given, "key", where),
        start=start,
        stored_bytes=stored_bytes,
        codec=_matching(given, "codec", _CODEC, where),
        stored_digest=_matching(given, "stored_digest", _CONTENT_DIGEST, where),
        content_digest=_matching(given, "content_digest", _CONTENT_DIGEST, where),
        bases=tuple(places),
    )
    same_box = all((bases[at].offset, bases[at].shape) == (chunk.offset, chunk.shape) for at in places)
    _need(same_box, where, "its base is another part of the tensor")
    if chunk.codec == RAW:
        _need(chunk.stored_digest == chunk.content_digest, where, "two digests of the same raw bytes")
        _need(not chunk.bases, where, "raw bytes that build on others")
    return chunk


def _check_tiling(entry: TensorEntry, where: str) -> None:
    """Chunks lie inside the tensor, do not overlap, and leave no hole."""
    for chunk in entry.chunks:
        _need(len(chunk.offset) == len(chunk.shape) == len(entry.shape), where, "a chunk of other dimensions")
        ends = [start + length for start, length in zip(chunk.offset, chunk.shape, strict=True)]
        _need(
            all(end <= size for end, size in zip(ends, entry.shape, strict=True)),
            where,
            "a chunk reaches outside",
        )
    # Without elements anything would cover it, and the chunk of a tensor in one piece is loaded as it is.
    _need(len(entry.chunks) > 1 or entry.chunks[0].shape == entry.shape, where, "its only chunk has another shape")
    boxes = [chunk for chunk in entry.chunks if chunk.num_elements]
    volume = sum(chunk.num_elements for chunk in boxes)
    total = TensorEntry(dtype=entry.dtype, shape=entry.shape, chunks=()).num_bytes
    _need(volume * DTYPES[entry.dtype].item_bytes == total, where, "its chunks do not cover it")
    _need(not any(_overlap(a, b) for a, b in combinations(boxes, 2)), where, "two chunks overlap")


def _overlap(one: Chunk, other: Chunk) -> bool:
    sides = zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides)


def _pack(given: JSON, what: str) -> PackEntry:
    name = _text(given, "name", what)
    _need(is_pack_name(name), what, f"{name[:80]!r} is not the name of a pack")
    pack = PackEntry(
        name=name,
        bytes=_whole(given, "bytes", what),
        header_bytes=_whole(given, "header_bytes", what),
        header_digest=_matching(given, "header_digest", _CONTENT_DIGEST, what),
    )
    _need(8 < pack.header_bytes <= pack.bytes, what, f"pack {name} has a header of {pack.header_bytes} bytes")
    return pack


def _need(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise CorruptCheckpointError(f"{where}: {problem}")


def _field(given: JSON, key: str, kind: type, where: str) -> JSON:
    value = given.get(key) if isinstance(given, dict) else None
    if type(value) is not kind:
        raise CorruptCheckpointError(f"{where}: {key} is {str(value)[:40]!r}, expected {kind.__name__}")
    return value


def _whole(given: JSON, key: str, where: str, most: int = MAX_BYTES) -> int:
    value: int = _field(given, key, int, where)
    _need(0 <= value <= most, where, f"{key} is {str(value)[:40]}, expected 0 to {most}")
    return value


def _flag(given: JSON, key: str, where: str) -> bool:
    value: bool = _field(given, key, bool, where)
    return value


def _text(given: JSON, key: str, where: str) -> str:
    value: str = _field(given, key, str, where)
    _need(len(value) <= MAX_TEXT, where, f"{key} has {len(value)} characters, expected at most {MAX_TEXT}")
    return value


def _matching(given: JSON, key: str, pattern: re.Pattern[str], where: str) -> str:
    value = _text(given, key, where)
    _need(pattern.fullmatch(value) is not None, where, f"{key} {value[:80]!r} does not match {pattern.pattern}")
    return value


def _texts(given: JSON, key: str, where: str) -> tuple[str, ...]:
    values = _list(given, key, where)
    _need(all(isinstance(value, str) and len(value) <= MAX_TEXT for value in values), where, f"{key}: no texts")
    return tuple(values)


def _list(given: JSON, key: str, where: str) -> list[JSON]:
    value: list[JSON] = _field(given, key, list, where)
    return value


def _dict(given: JSON, key: str, where: str) -> dict[str, JSON]:
    value: dict[str, JSON] = _field(given, key, dict, where)
    return value


def _shape(given: JSON, key: str, where: str) -> tuple[int, ...]:
    sizes = _list(given, key, where)
    fine = len(sizes) <= MAX_DIMS and all(type(size) is int and 0 <= size <= MAX_BYTES for size in sizes)
    _need(fine, where, f"{key} is not at most {MAX_DIMS} whole numbers")
    return tuple(sizes)
