"""Pinned steps: checkpoints that somebody wants kept, with a note.

A sealed file beside the manifests, which a training reads whenever it is about to drop something. It may be changed
at any time and by anybody who may write to the folder, with no regard to who owns the run:

- One atomic rename replaces it, so that a reader finds the old pins or the new ones.
- Who changes it holds a lock on `pins.lock` from reading the old pins to the rename, so that of two changes at once
  the second builds on the first. The system takes that lock from a process that dies. Nobody holds it for longer
  than a write, and no training ever waits for it.
- `pin` writes, and looks for the manifest then; whoever drops a checkpoint hides its manifest, and looks at the pins
  then (`Ledger.apply`). At least one of the two sees the other: a checkpoint stays pinned, or `pin` says that it is
  gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.layout import MAX_STEP, PINS, PINS_LOCK, manifest_name
from dino_exp.errors import CheckpointError, CorruptCheckpointError, LockedError, NoCheckpointError, UsageError
from dino_exp.fsio import LOCAL, DamagedFileError, Files, write_atomic

MAX_NOTE_CHARS = 1000
_MAX_BYTES = 1 << 20
_WAIT_SECS = 10.0  # others hold the lock for milliseconds
_POLL_SECS = 0.05
_NUM_LOOKS = 5


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
    """Replace all pins. To change some of them, call `pin` and `unpin`, which keep those of others.

    Raises CheckpointError when they are too many to be read back, OSError.
    """
    body = {"format_version": 1, "pins": {str(step): note for step, note in pins.items()}}
    data = seal(body)
    if len(data) > _MAX_BYTES:
        raise CheckpointError(
            f"{folder / PINS}: {len(pins)} pins take {len(data)} bytes, expected at most {_MAX_BYTES}"
        )
    write_atomic(folder / PINS, data, files)


def pin(
    folder: Path,
    step: int,
    note: str | None = None,
    *,
    files: Files = LOCAL,
    wait_secs: float = _WAIT_SECS,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Pin a step, and return the note that it had if it was pinned already. `note` None leaves that one as it is.

    Raises NoCheckpointError when the checkpoint is not there, or was dropped while it was pinned: then no pin is
    left. Raises UsageError for a note that is too long or not printable, LockedError, CorruptCheckpointError, OSError.
    """
    if note is not None:
        _check_note(note)
    manifest = folder / manifest_name(step)
    if files.size(manifest) is None:
        raise NoCheckpointError(f"{manifest}: there is no such checkpoint, so it cannot be pinned")
    with _changing(folder, wait_secs, sleep):
        pins = load_pins(folder, files)
        before = pins.get(step)
        _save(folder, {**pins, step: (before or "") if note is None else note}, files)
        if not _is_there(manifest, files, sleep):
            _save(folder, {other: text for other, text in pins.items() if other != step}, files)
            raise NoCheckpointError(f"{manifest}: dropped just now, while it was being pinned; the pin is taken back")
    return before


def unpin(
    folder: Path,
    step: int,
    *,
    files: Files = LOCAL,
    wait_secs: float = _WAIT_SECS,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Take a pin away, whether its checkpoint is still there or not; the note that it had.

    Raises UsageError when the step is not pinned, LockedError, CorruptCheckpointError, OSError.
    """
    if not files.listdir(folder):
        raise _not_pinned(folder, step, {})
    with _changing(folder, wait_secs, sleep):
        pins = load_pins(folder, files)
        if step not in pins:
            raise _not_pinned(folder, step, pins)
        _save(folder, {other: note for other, note in pins.items() if other != step}, files)
    return pins[step]


def _save(folder: Path, pins: Mapping[int, str], files: Files) -> None:
    try:
        save_pins(folder, pins, files)
    except FileNotFoundError:  # a training that started just now swept our temporary file, as a dead writer's
        save_pins(folder, pins, files)


def _is_there(manifest: Path, files: Files, sleep: Callable[[float], None]) -> bool:
    """Whether the manifest is there; one that is hidden for a moment is looked for again."""
    for _ in range(_NUM_LOOKS):
        if files.size(manifest) is not None:
            return True
        sleep(_POLL_SECS)
    return files.size(manifest) is not None


@contextlib.contextmanager
def _changing(folder: Path, wait_secs: float, sleep: Callable[[float], None]) -> Iterator[None]:
    """Be the only one who changes the pins.

    Raises LockedError when another is at it for longer than `wait_secs`, CheckpointError where nothing can be locked.
    """
    path = folder / PINS_LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        waited_secs = 0.0
        while not _try_lock(fd, path):
            if waited_secs >= wait_secs:
                raise LockedError(
                    f"{path}: another process has been changing the pins for {waited_secs:.0f} s; nothing was changed. "
                    "Try again, or find it: fuser -v " + str(path)
                )
            sleep(_POLL_SECS)
            waited_secs += _POLL_SECS
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this opening, so it keeps out other threads too
    except BlockingIOError:
        return False
    except OSError as error:
        raise CheckpointError(
            f"{path}: this file system cannot lock ({error.strerror}); nothing was changed"
        ) from error
    return True


def _check_note(note: str) -> None:
    if len(note) > MAX_NOTE_CHARS or not note.isprintable():
        raise UsageError(
            f"note {note[:40]!r}: found {len(note)} characters, expected one line of printable text, "
            f"at most {MAX_NOTE_CHARS}"
        )


def _not_pinned(folder: Path, step: int, pins: Mapping[int, str]) -> UsageError:
    listed = ", ".join(map(str, sorted(pins))) or "none"
    return UsageError(f"{folder}: step {step} is not pinned; pinned here: {listed}")


def _is_pin(step: str, note: object) -> bool:
    plain = step.isascii() and step.isdecimal() and len(step) <= len(str(MAX_STEP)) and step == str(int(step))
    return plain and isinstance(note, str)


def _damaged(path: Path, problem: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path}: {problem}; nothing is dropped while pins cannot be read. Put it back from a copy, or remove "
        "it, and what was pinned is kept no longer"
    )
