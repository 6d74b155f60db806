"""Two checkpoints, of one run or of two: what of their weights, metrics and settings differs, and by how much."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino_exp.analysis.measures import Sums, on_one_core, sums_of
from dino_exp.analysis.names import block_of, is_statistic, part_of, place_in_network
from dino_exp.checkpoint.arrays import OpenCheckpoint
from dino_exp.checkpoint.canonical import metrics_to_json
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.store import Store
from dino_exp.config.fields import walk_mapping
from dino_exp.errors import DinoExpError
from dino_exp.fsio import DamagedFileError, parse_json

_COUNTERS = (".step", ".num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor in both, A and B. `change` is the norm of B - A, `relative` that over the norm of A.

    `only_in` is "a" or "b" where the other has none (then there are no numbers), `problem` says why it could not be
    compared.
    """

    name: str
    shape: tuple[int, ...]
    change: float | None = None
    relative: float | None = None
    cosine: float | None = None
    largest: float | None = None
    norm_a: float | None = None
    only_in: str | None = None
    problem: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether both have it, with the same values."""
        return self.change == 0.0

    @property
    def is_counter(self) -> bool:
        """Whether it counts steps: it differs between any two checkpoints, and says nothing about weights."""
        return self.name.endswith(_COUNTERS)

    @property
    def part(self) -> str:
        """`student`, `teacher`, `optimizer`, `loss`."""
        return part_of(self.name)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that differs. `tensors` are in the order of A, and behind them what only B has."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    tensors: tuple[TensorDifference, ...]
    metrics: tuple[Mapping[str, Any], ...]
    settings: tuple[Mapping[str, Any], ...]
    origin: tuple[Mapping[str, Any], ...]

    @property
    def is_equal(self) -> bool:
        """Whether all tensors are."""
        return all(one.is_equal for one in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.is_equal,
            "tensors": [one.as_json() for one in self.tensors],
            "metrics": list(self.metrics),
            "settings": list(self.settings),
            "origin": list(self.origin),
        }


def compare_checkpoints(
    a: tuple[Store, int], b: tuple[Store, int], progress: Callable[[int], None] = lambda _: None
) -> Comparison:
    """Read both, tensor by tensor. `progress` hears of bytes of tensors read.

    Raises CorruptCheckpointError for a manifest that cannot be read, FileNotFoundError, OSError; a tensor that is
    damaged is told as such.
    """
    with on_one_core(), OpenCheckpoint(*a) as one, OpenCheckpoint(*b) as other:
        names = dict.fromkeys((*one.manifest.tensors, *other.manifest.tensors))
        return Comparison(
            a=_facts(one.manifest),
            b=_facts(other.manifest),
            tensors=tuple(_difference(one, other, name, progress) for name in names),
            metrics=_rows(metrics_to_json(one.manifest.metrics), metrics_to_json(other.manifest.metrics)),
            settings=_rows(_settings(one.manifest), _settings(other.manifest)),
            origin=_rows(_origin(one.manifest), _origin(other.manifest)),
        )


def _difference(
    one: OpenCheckpoint, other: OpenCheckpoint, name: str, progress: Callable[[int], None]
) -> TensorDifference:
    a, b = one.manifest.tensors.get(name), other.manifest.tensors.get(name)
    if a is None or b is None:
        there = a or b
        assert there is not None
        return TensorDifference(name=name, shape=there.shape, only_in="a" if b is None else "b")
    progress(a.num_bytes + b.num_bytes)
    if a.shape != b.shape:
        return TensorDifference(name=name, shape=a.shape, problem=f"shape {list(a.shape)}, in B {list(b.shape)}")
    try:
        sums = sums_of(one.load(name), other.load(name))
    except (DinoExpError, FileNotFoundError) as damage:
        return TensorDifference(name=name, shape=a.shape, problem=str(damage))
    return TensorDifference(
        name=name,
        shape=a.shape,
        change=sums.distance,
        relative=0.0 if sums.difference == 0 else sums.relative,
        cosine=sums.cosine,
        largest=sums.largest,
        norm_a=float(sums.a**0.5),
    )


def largest_first(tensors: Sequence[TensorDifference], by: str = "relative") -> list[TensorDifference]:
    """What cannot be compared first, then the largest change, and counters last.

    `by` is relative, change or cosine. A change from zero is beyond every ratio, and has no angle.
    """

    def size(one: TensorDifference) -> tuple[bool, bool, float]:
        if one.change is None:
            return True, True, 0.0
        value = {"relative": one.relative, "change": one.change, "cosine": one.cosine and -one.cosine}[by]
        return not one.is_counter, False, math.inf if value is None and one.change else value or 0.0

    return sorted(tensors, key=size, reverse=True)


def relative_by_layer(tensors: Sequence[TensorDifference], part: str) -> dict[tuple[str, str], float | None]:
    """The relative change of a part's layers, by block and kind (`backbone.blocks.3`, `attn.qkv`), through the network.

    Weight and bias of a layer count together, statistics of batch norm do not, as in `evolution`; None where A is zero.
    """
    cells: dict[tuple[str, str], Sums] = {}
    for one in sorted(tensors, key=lambda one: place_in_network(one.name)):
        if one.part != part or is_statistic(one.name) or one.change is None or one.norm_a is None:
            continue
        block = block_of(one.name)
        kind = one.name.removeprefix(f"{part}.{block}").strip(".")
        kind = re.sub(r"(^|\.)(weight|bias|weight_g|weight_v)$", "", kind)
        cells[block, kind] = cells.get((block, kind), Sums()) + Sums(a=one.norm_a**2, difference=one.change**2)
    return {place: sums.relative for place, sums in cells.items()}


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "run_key": manifest.record.get("run_key"),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "created_at": manifest.created_at,
        "state_digest": manifest.state_digest,
    }


def _origin(manifest: Manifest) -> dict[str, Any]:
    names = ("config_hash", "git_commit", "git_dirty", "code_id", "data_fingerprint")
    return {name: manifest.record.get(name) for name in names} | {"world_size": manifest.world_size}


def _settings(manifest: Manifest) -> dict[str, Any]:
    """The identity settings that it records, by dotted key; none where it records none that can be read."""
    text = manifest.record.get("config")
    with contextlib.suppress(DamagedFileError):
        if isinstance(text, str):
            found = parse_json(text.encode("utf-8", "replace"), "config", max_depth=16)
            return dict(walk_mapping(found)) if isinstance(found, dict) else {}
    return {}


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    keys = dict.fromkeys((*a, *b))
    return tuple({"key": key, "a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key))
