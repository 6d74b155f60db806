"""Lines that people can type as they stand: quoted for Hydra's grammar, and that for the shell."""

from __future__ import annotations

import re
import shlex

from dino_exp.errors import DinoExpError, NothingSavedError

_PLAIN = re.compile(r"[A-Za-z0-9_./~@+-]+( [A-Za-z0-9_./~@+-]+)*")
_NO_TEXT = re.compile(r"null|true|false|[+-]?(nan|inf|[0-9_.]+(e[+-]?[0-9_]+)?)", re.IGNORECASE)
_BEFORE_QUOTE = re.compile(r'(\\*)("|$)')
_BEFORE_REFERENCE = re.compile(r"(\\*)\$\{")


def override(key: str, value: object) -> str:
    """`key=value` for a text value, such that Hydra reads that text: commas and brackets mean something to it."""
    text = str(value)
    if _PLAIN.fullmatch(text) and not _NO_TEXT.fullmatch(text):
        return f"{key}={text}"
    # Backslashes are doubled before a quote, for Hydra, and before `${`, for OmegaConf, and nowhere else.
    text = _BEFORE_REFERENCE.sub(lambda found: found[1] * 2 + "\\${", text)
    text = _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'{key}="{text}"'


def setting_text(value: object) -> str:
    """The value of a setting as people type it, for tables and messages: null, true, [a, b]; a number in full."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case list() | tuple():
            return "[" + ", ".join(map(setting_text, value)) + "]"
        case float():
            short = f"{value:.6g}"
            return short if float(short) == value else repr(value)
        case _:
            return str(value)


def failure_text(failure: DinoExpError) -> str:
    """What is told of a failure: its message, and what to do, where more was known of that than where it was raised."""
    lines = [str(failure), *getattr(failure, "__notes__", ())]
    if isinstance(failure, NothingSavedError):
        lines.append(f"To go on with it: {train_command(override('resume', failure.directory))}")
    return "\n".join(lines)


def train_command(*words: str) -> str:
    """The line that trains with these overrides and options."""
    return shlex.join(["python", "-m", "dino_exp.train", *words])
