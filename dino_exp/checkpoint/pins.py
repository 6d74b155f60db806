"""Pinned steps: checkpoints that somebody wants kept, with a note.

A sealed file, written by hand of a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.layout import MAX_STEP, PINS
from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import LOCAL, DamagedFileError, Files, write_atomic

_MAX_BYTES = 1 << 20


def load_pins(folder: Path, files: Files = LOCAL) -> dict[int, str]:
    """The note of each pinned step. Raises CorruptCheckpointError, OSError."""
    path = folder / PINS
    try:
        data = files.read_bytes(path, _MAX_BYTES)
    except FileNotFoundError:
        return {}
    except DamagedFileError as damage:
        raise _damaged(path, str(damage)) from damage
    try:
        pins = unseal(data, PINS).get("pins")
    except CorruptCheckpointError as damage:
        raise _damaged(path, str(damage)) from damage
    if not isinstance(pins, dict) or not all(_is_pin(step, note) for step, note in pins.items()):
        raise _damaged(path, "its pins are not notes by step")
    return {int(step): note for step, note in pins.items()}


def save_pins(folder: Path, pins: Mapping[int, str], files: Files = LOCAL) -> None:
    """Replace all pins. Raises OSError."""
    body = {"format_version": 1, "pins": {str(step): note for step, note in pins.items()}}
    write_atomic(folder / PINS, seal(body), files)


def _is_pin(step: str, note: object) -> bool:
    plain = step.isascii() and step.isdecimal() and len(step) <= len(str(MAX_STEP)) and step == str(int(step))
    return plain and isinstance(note, str)


def _damaged(path: Path, problem: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path}: {problem}; nothing is dropped while pins cannot be read. Put it back from a copy, or remove "
        "it, and what was pinned is kept no longer"
    )
