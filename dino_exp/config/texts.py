"""Settings that are written as a text with parts: what the parts are.

Each reader raises ConfigError that says in words what was expected and what was found, without the setting's name.
"""

from __future__ import annotations

import re
from datetime import datetime

from dino_exp.errors import ConfigError

METRICS = ("knn_top1", "knn5_top1", "knn_10shot", "knn_1shot", "val_loss")
MODES = ("max", "min")
_COUNT = re.compile(r"[1-9][0-9]{0,8}")


def read_best(text: str) -> tuple[str, str, int]:
    """`"val_loss:min:1"`: the metric, the mode, and how many of the best to keep. Raises ConfigError."""
    parts = text.split(":")
    if len(parts) == 3 and parts[0] in METRICS and parts[1] in MODES and _COUNT.fullmatch(parts[2]):
        return parts[0], parts[1], int(parts[2])
    raise ConfigError(
        f'expected "metric:mode:N" with a metric of {", ".join(METRICS)}, a mode of {", ".join(MODES)}, and N at '
        f'least 1 (for example "val_loss:min:1"), got {text!r}'
    )


def read_moment(text: str) -> float:
    """A moment in ISO 8601 with its zone, as unix seconds. Raises ConfigError."""
    expected = f"expected a date and time with zone, such as 2026-11-24T18:00:00+01:00, got {text!r}"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(expected) from None
    if moment.tzinfo is None:  # the same words would mean another moment on another machine
        raise ConfigError(f"{expected}, which has no zone")
    return moment.timestamp()
