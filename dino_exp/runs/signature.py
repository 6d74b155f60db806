"""Whether a user's own key has signed the record of some code: what tells a run that one made from a stranger's.

The key lies below the user's state directory and never in a run, so whoever made up a run has not got it. A machine
that gives no place for a key signs nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dino_exp.fsio import LOCAL, DamagedFileError

NAME = "signature"
_KEY_BYTES = 32
_PURPOSE = b"dino_exp: recorded code, version 1"


def own_key(environ: Mapping[str, str], *, make: bool = False) -> bytes | None:
    """The key of this user, made where `make` asks for it; None where there is none, or no place for one."""
    base = environ.get("XDG_STATE_HOME", "")
    base = base if base.startswith("/") else os.path.expanduser("~/.local/state")  # noqa: PTH111 (never raises)
    path = Path(base) / "dino_exp" / "key"
    try:
        if make and not path.exists():
            _make(path)
        key = LOCAL.read_bytes(path, _KEY_BYTES)
    except (OSError, DamagedFileError):  # a home that is read-only, missing, or full: then it stays unsigned
        return None
    return key if len(key) == _KEY_BYTES else None


def sign(key: bytes, run_key: str, described: bytes) -> str:
    """The signature of a run's `git.json`, which has the digests of all other files of its code."""
    text = b"\0".join((_PURPOSE, run_key.encode(), described))
    return hmac.digest(key, text, "sha256").hex()


def is_signed(key: bytes | None, run_key: str, described: bytes, signature: Path) -> bool:
    """Whether the file `signature` holds that of this key. Raises nothing: what cannot be read is no signature."""
    try:
        found = LOCAL.read_bytes(signature, 100).strip()
    except (OSError, DamagedFileError):
        return False
    return key is not None and hmac.compare_digest(found, sign(key, run_key, described).encode())


def _make(path: Path) -> None:
    """Of several processes that make one at once, one succeeds. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent)  # nobody else may read it
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(name)
    finally:
        Path(name).unlink()
