"""Sizes, ages, durations and counts, as people say them."""

from __future__ import annotations

import re
from datetime import datetime

_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")


def size_text(num_bytes: float) -> str:
    """Bytes in decimal units: `701 MB`, `1.2 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"


def age_text(created_at: str, now_secs: float) -> str:
    """How long ago an ISO time was: `12s ago`, `3h ago`, and the day itself from a month on; as it is if it is none."""
    try:
        created = datetime.fromisoformat(created_at)
        secs = now_secs - created.timestamp()
    except (ValueError, OverflowError, OSError):
        return created_at
    if not -60 < secs < 30 * 86_400:  # a clock that was set back says when, not how long ago
        return created_at[:10]
    for unit, num_secs in (("d", 86_400), ("h", 3600), ("m", 60)):
        if secs >= num_secs:
            return f"{secs // num_secs:.0f}{unit} ago"
    return f"{max(secs, 0):.0f}s ago"


def moment_text(moment: str) -> str:
    """A moment in ISO 8601 (UTC) to the second: `2026-01-02 03:04:05`; as it begins if it is none."""
    return moment[:19].replace("T", " ")


def duration_text(secs: float) -> str:
    """Seconds as people say them: `42s`, `3m 05s`, `2h 07m`, `3d 04h`."""
    secs = int(secs)
    if secs < 60:
        return f"{secs}s"
    if secs < 3600:
        return f"{secs // 60}m {secs % 60:02d}s"
    if secs < 86400:
        return f"{secs // 3600}h {secs % 3600 // 60:02d}m"
    return f"{secs // 86400}d {secs % 86400 // 3600:02d}h"


def with_short_digests(text: str) -> str:
    """A text for a table: of each digest of 64 digits the first eight, `s1:b8bf7757`."""
    return _DIGEST.sub(r"\1", text)


def count_text(num: int, noun: str) -> str:
    """`1 checkpoint`, `2,000 checkpoints`."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"
