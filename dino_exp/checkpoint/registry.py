"""registry.json: the index of one run's checkpoints, keyed by configuration hash and code.

It is derived and may be deleted. Whoever reads it compares each row with the last bytes of the manifest
that it stands for, so a stale, damaged or foreign registry costs a rescan of what differs and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dino_exp.checkpoint.canonical import metrics_from_json, metrics_to_json, seal, unseal
from dino_exp.checkpoint.layout import REGISTRY, is_pack_name
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.manifest_parse import parse_schedule
from dino_exp.checkpoint.policies import KeepAny, retention_from_json
from dino_exp.checkpoint.store import Identity, Store
from dino_exp.checkpoint.types import JSON, CheckpointInfo, Schedule
from dino_exp.errors import ConfigError, CorruptCheckpointError
from dino_exp.fsio import DamagedFileError, write_atomic

FORMAT_VERSION = 2
_MAX_BYTES = 64 << 20
_ORIGIN = ("config_hash", "git_commit", "code_id")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the index knows of one checkpoint: enough to list it, to rank it, and to sweep around it."""

    info: CheckpointInfo
    config_hash: str | None
    git_commit: str | None
    code_id: str | None
    state_digest: str | None
    content_bytes: int
    packs: tuple[str, ...]
    pack_bytes: tuple[int, ...]
    identity: Identity


@dataclass(frozen=True, kw_only=True)
class Index:
    """All checkpoints of a folder: rows by step ascending, and why each unreadable manifest is unreadable.

    `policy` and `schedule` are those of the newest row; None when there is none. `current` says that
    registry.json on disk holds exactly these rows.
    """

    rows: Mapping[int, Row]
    damaged: Mapping[int, str]
    policy: JSON = None
    schedule: Schedule | None = None
    current: bool = False

    def retention(self) -> KeepAny:
        """The recorded policy; without rules where there is none, or one that this version does not know."""
        try:
            return retention_from_json(self.policy)
        except ConfigError:
            return KeepAny(())


def row_of(manifest: Manifest, identity: Identity, *, verified: bool) -> Row:
    """The row of a manifest. Its bytes are those of its packs and of itself."""
    origin = {name: manifest.record.get(name) for name in _ORIGIN}
    return Row(
        info=manifest.info(verified=verified, num_bytes=manifest.stored_bytes + identity[0]),
        **{name: text if isinstance(text, str) else None for name, text in origin.items()},
        state_digest=manifest.state_digest,
        content_bytes=manifest.content_bytes,
        packs=tuple(pack.name for pack in manifest.packs),
        pack_bytes=tuple(pack.bytes for pack in manifest.packs),
        identity=identity,
    )


def read_index(store: Store) -> Index:
    """The checkpoints on disk: from the registry where it agrees with the manifests, else from these.

    Writes nothing. Raises UnsupportedFormatError for a manifest of a newer version, OSError.
    """
    recorded = _read_registry(store)
    rows, damaged = {}, {}
    for step in store.steps():
        row = recorded.rows.get(step)
        if row is not None and row.identity == store.identity(step):
            rows[step] = row
            continue
        try:
            manifest, identity = store.read(step, with_tensors=False)
        except CorruptCheckpointError as damage:
            damaged[step] = str(damage)
        except FileNotFoundError:
            continue  # dropped by its writer since the folder was listed
        else:
            rows[step] = row_of(manifest, identity, verified=False)
    if rows and max(rows) == max(recorded.rows, default=None) and rows[max(rows)] is recorded.rows[max(rows)]:
        policy, schedule = recorded.policy, recorded.schedule
    else:
        policy, schedule = _newest_policy(store, rows)
    current = list(rows.values()) == list(recorded.rows.values())
    return Index(rows=rows, damaged=damaged, policy=policy, schedule=schedule, current=current)


def _newest_policy(store: Store, rows: Mapping[int, Row]) -> tuple[JSON, Schedule | None]:
    for step in sorted(rows, reverse=True):
        try:
            manifest, _ = store.read(step, with_tensors=False)
        except (CorruptCheckpointError, FileNotFoundError):
            continue
        return manifest.policy, manifest.schedule
    return None, None


def missing_packs(store: Store, row: Row) -> str | None:
    """Why a row's packs are not what it names, judged by their sizes; None when they are."""
    for name, num_bytes in zip(row.packs, row.pack_bytes, strict=True):
        found = store.files.size(store.packs_folder / name)
        if found != num_bytes:
            return f"pack {name}: " + ("missing" if found is None else f"{found} bytes, expected {num_bytes}")
    return None


def write_registry(store: Store, rows: Iterable[Row], policy: JSON, schedule: Schedule) -> None:
    """Replace the registry. It is derived, so it need not be durable. Raises OSError."""
    groups: dict[tuple[str | None, ...], list[JSON]] = {}
    for row in sorted(rows, key=lambda row: row.info.step):
        groups.setdefault(tuple(getattr(row, name) for name in _ORIGIN), []).append(_row_to_json(row))
    body = {
        "format_version": FORMAT_VERSION,
        "policy": policy,
        "schedule": {"horizon_steps": schedule.horizon_steps, "steps_per_epoch": schedule.steps_per_epoch},
        "versions": [
            {**dict(zip(_ORIGIN, origin, strict=True)), "checkpoints": group} for origin, group in groups.items()
        ],
    }
    write_atomic(store.folder / REGISTRY, seal(body), store.files, durable=False)


def _read_registry(store: Store) -> Index:
    """What registry.json says; empty when it is missing, damaged or of another version."""
    nothing = Index(rows={}, damaged={})
    try:
        data = store.files.read_bytes(store.folder / REGISTRY, _MAX_BYTES)
        body = unseal(data, REGISTRY)
        if body["format_version"] != FORMAT_VERSION:
            return nothing
        rows = [_row_from_json(row, group) for group in body["versions"] for row in group["checkpoints"]]
        ordered = {row.info.step: row for row in sorted(rows, key=lambda row: row.info.step)}
        return replace(
            nothing, rows=ordered, policy=body["policy"], schedule=parse_schedule(body["schedule"], REGISTRY)
        )
    except (FileNotFoundError, DamagedFileError, CorruptCheckpointError, KeyError, TypeError, ValueError):
        return nothing  # an index is only worth what agrees with the manifests: they are read instead


def _row_to_json(row: Row) -> JSON:
    info = row.info
    return {
        "step": info.step,
        "epoch": info.epoch,
        "created_at": info.created_at,
        "metrics": metrics_to_json(info.metrics),
        "reasons": list(info.reasons),
        "healthy": info.healthy,
        "resumable": info.resumable,
        "verified": info.verified,
        "bytes": info.bytes,
        "state_digest": row.state_digest,
        "content_bytes": row.content_bytes,
        "packs": dict(zip(row.packs, row.pack_bytes, strict=True)),
        "manifest": list(row.identity),
    }


_ROW_TYPES: dict[str, Any] = {
    "step": int,
    "epoch": int,
    "created_at": str,
    "healthy": bool,
    "resumable": bool,
    "verified": bool,
    "bytes": int,
}


def _row_from_json(given: JSON, group: JSON) -> Row:
    """Raises KeyError, TypeError, ValueError, CorruptCheckpointError for anything but a row."""
    facts = {name: _typed(given[name], kind) for name, kind in _ROW_TYPES.items()}
    num_bytes, digest = given["manifest"]
    packs = {name: _typed(size, int) for name, size in _typed(given["packs"], dict).items()}
    if not all(map(is_pack_name, packs)):
        raise ValueError("not the name of a pack")
    return Row(
        info=CheckpointInfo(
            **facts,
            metrics=metrics_from_json(given["metrics"], REGISTRY),
            reasons=tuple(_typed(reason, str) for reason in given["reasons"]),
        ),
        **{name: None if group[name] is None else _typed(group[name], str) for name in _ORIGIN},
        state_digest=None if given["state_digest"] is None else _typed(given["state_digest"], str),
        content_bytes=_typed(given["content_bytes"], int),
        packs=tuple(packs),
        pack_bytes=tuple(packs.values()),
        identity=(_typed(num_bytes, int), _typed(digest, str)),
    )


def _typed(value: JSON, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise ValueError("expected a whole number from 0, of 63 bits")
    return value
