"""The line that starts a run again, as it was typed at first."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from unicodedata import bidirectional, category

from dino_exp.config.plain_yaml import parse_plain_yaml
from dino_exp.config.typed import train_command
from dino_exp.errors import UsageError
from dino_exp.fsio import LOCAL, DamagedFileError
from dino_exp.runs.layout import RunPaths

_MAX_BYTES = 1 << 20
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # turn the order of what follows


def command_of(paths: RunPaths) -> str:
    """The line that starts the same run, as it was typed at first. Raises DamagedFileError, UsageError."""
    path = paths.hydra_dir / "overrides.yaml"
    options: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # it is there only if there were any
        options = _words(paths.hydra_dir / "options.yaml")
    try:
        return train_command(*options, *_words(path))
    except FileNotFoundError as gone:
        raise UsageError(
            f"{path}: it is gone, so nobody knows what was typed; {paths.config_yaml} has the values"
        ) from gone


def words_with(paths: RunPaths, words: Sequence[str]) -> list[str]:
    """What was typed when the run began, from nothing, with `words` in the place of what they say otherwise.

    Only `words` where that cannot be read any more.
    """
    asked = {key_of(word) for word in words} | {"resume", "fork"}
    before: list[str] = []
    with contextlib.suppress(FileNotFoundError, DamagedFileError):
        before = [word for word in _words(paths.hydra_dir / "overrides.yaml") if key_of(word) not in asked]
    return [*before, *words]


def key_of(word: str) -> str:
    """What an override is about: `optimizer.lr` of `+optimizer.lr=1e-3`."""
    return word.lstrip("+~").partition("=")[0]


def _words(path: Path) -> list[str]:
    words = parse_plain_yaml(LOCAL.read_bytes(path, _MAX_BYTES), str(path))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DamagedFileError(f"{path}: found {type(words).__name__}, expected a list of words")
    odd = next((char for word in words for char in word if _is_unsafe(char)), None)
    if odd is not None:
        raise DamagedFileError(f"{path}: holds the character {odd!a}, which nobody types, and no terminal shows")
    return words


def _is_unsafe(char: str) -> bool:
    """Whether showing this would do something to a terminal, or would make a line look like another one."""
    return (category(char) in ("Cc", "Cs") and char not in "\n\t") or bidirectional(char) in _TURNS
