"""Standard output and error as programs need them: whatever they are told, they take."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path


def steady_streams() -> None:
    """Let both take any text from now on: none is missing, and what their encoding has no letter for is escaped."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (None: whoever started us has closed it)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # half a character in a file's text is no traceback
