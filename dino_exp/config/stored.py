"""A run's settings on disk: `config.yaml` for people, `config.canonical.json` exactly as it was hashed.

Both must say the same when a run is resumed. Where the run lies, which run it continues or forks, and of which sweep
it is (`paths`, `resume`, `fork`, `sweep`), is not stored: a copied run must not point back to where it came from. Nor
is `plan`, with which no run begins.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from dino_exp.config.canonical import canonical_text, config_hash, group_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compare import as_mapping, roles_by_key
from dino_exp.config.fields import walk_mapping
from dino_exp.config.plain_yaml import parse_plain_yaml
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError, RefusedError
from dino_exp.fsio import LOCAL, parse_json, write_atomic

YAML_NAME = "config.yaml"
CANONICAL_NAME = "config.canonical.json"
MAX_BYTES = 1_000_000
MAX_SETTINGS = 1_000  # several times as many as there are: each unknown one is compared with all that are known
_MAX_KEY_CHARS = 200
_MAX_MESSAGE_CHARS = 2_000
_DIGEST = re.compile(rb"^# digest: (sha256:[0-9a-f]{64})$", re.MULTILINE)
_PLACES = ("resume", "fork", "plan", "paths", "sweep")


def write_stored(config: Config, directory: Path) -> None:
    """Write both files durably into an existing run directory. Raises OSError."""
    write_atomic(directory / YAML_NAME, yaml_text(config))
    write_atomic(directory / CANONICAL_NAME, canonical_text(config))


def yaml_text(config: Config) -> str:
    """The resolved settings for people to read, with the hashes in a heading."""
    plain = {key: value for key, value in as_mapping(config).items() if key not in _PLACES}
    head = (
        "# The settings of this run, as resolved at its first start. Do not edit: a resume compares them\n"
        f"# with {CANONICAL_NAME}. To change one, give it on the command line, with resume= or fork=.\n"
        f"# config_hash: {config_hash(config)}\n# group_hash: {group_hash(config)}\n# digest: {_digest(plain)}\n"
    )
    return head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def stored_values(directory: Path) -> dict[str, Any]:
    """Every setting of a run by dotted key, as `config.yaml` has it: to be shown or compared, not to be resumed with.

    Raises FileNotFoundError; DamagedFileError for a file that is not plain data of a sensible size.
    """
    path = directory / YAML_NAME
    return dict(walk_mapping(parse_plain_yaml(LOCAL.read_bytes(path, MAX_BYTES), str(path))))


def load_stored(directory: Path) -> Config:
    """The settings of the run in `directory`; nothing in its files is interpolated, imported or instantiated.

    `paths.outputs` is where the run lies now (`outputs/runs/<run>`). Raises FileNotFoundError;
    DamagedFileError for a file that is not plain data of a sensible size; RefusedError for settings that this
    version does not know or allow, when the two files disagree, naming the keys, and when a setting changed that
    only one of them holds.
    """
    yaml_path, canonical_path = directory / YAML_NAME, directory / CANONICAL_NAME
    shown = LOCAL.read_bytes(yaml_path, MAX_BYTES)
    mapping = parse_plain_yaml(shown, str(yaml_path))
    recorded = LOCAL.read_bytes(canonical_path, MAX_BYTES)
    if not isinstance(mapping, dict):
        raise RefusedError(f"{yaml_path}: expected settings, found {type(mapping).__name__}")
    config = _checked(mapping, yaml_path, outputs=str(directory.absolute().parent.parent))
    if canonical_text(config).encode() != recorded:
        raise RefusedError(_disagreement(config, recorded, yaml_path, canonical_path))
    stated = _DIGEST.search(shown)
    if stated is not None and stated[1].decode() != _digest(mapping):  # a setting that is not part of the identity
        raise RefusedError(
            f"{yaml_path}: not the settings that were written: a byte changed, or somebody edited it. Undo that, or "
            "take out the line `# digest:` to accept it; a resume takes other settings on the command line"
        )
    return config


def _checked(mapping: dict[str, Any], path: Path, outputs: str) -> Config:
    keys = [key for key, _ in walk_mapping(mapping)]
    if len(keys) > MAX_SETTINGS or max(map(len, keys), default=0) > _MAX_KEY_CHARS:
        raise RefusedError(f"{path}: {len(keys)} settings, some of them of absurd names; no run is configured so")
    strange = [f"{key}: never taken from a run" for key in _PLACES if key in mapping]
    strange += [f"{key}: an interpolation; only plain values are read" for key in _interpolated(mapping)]
    if strange:
        raise RefusedError(f"{path}: " + _short("\n  ".join(strange)))
    sweep = {"name": None, "dry_run": False}
    paths = {"outputs": outputs, "cache": f"{outputs}/cache"}
    places = {"resume": None, "fork": None, "plan": False, "paths": paths, "sweep": sweep}
    try:
        config = config_from_mapping({**mapping, **places})
        canonical_text(config)
        return config
    except ConfigError as error:
        raise RefusedError(
            f"{path}: these are not settings of this version; {_short(str(error))}\n"
            "The file was edited, or written by another version: restore it, or start a new run"
        ) from error


def _digest(mapping: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()


def _interpolated(mapping: dict[str, Any]) -> list[str]:
    """Keys outside the runtime role whose text looks like an interpolation."""
    roles = roles_by_key()
    return [
        key
        for key, value in walk_mapping(mapping)
        if isinstance(value, str) and "${" in value and roles.get(key) != "runtime"
    ]


def _disagreement(config: Config, recorded: bytes, yaml_path: Path, canonical_path: Path) -> str:
    hashed = dict(walk_mapping(parse_json(recorded, str(canonical_path), max_depth=16)))
    shown = dict(walk_mapping(parse_json(canonical_text(config).encode(), str(yaml_path))))
    keys = [key for key in {**hashed, **shown} if hashed.get(key) != shown.get(key)]
    lines = [f"{key}: {shown.get(key)!r} here, {hashed.get(key)!r} in {canonical_path.name}" for key in keys]
    return (
        f"{yaml_path} and {canonical_path.name} disagree:\n  "
        + _short("\n  ".join(lines or ["the same values, written differently"]))
        + "\nOne of them was edited. Undo the edit; to run with other settings, use fork="
    )


def _short(text: str) -> str:
    """A message must not be a copy of a file that somebody filled up, nor say things to the terminal."""
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return shown if len(shown) <= _MAX_MESSAGE_CHARS else shown[:_MAX_MESSAGE_CHARS] + " ..."
