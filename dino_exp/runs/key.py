"""The run key: the name of a run, a function of its settings and its code.

`<model>-<config8>-<code8>`, and `-<variant>` when one is set. A model name has no hyphen, so the text reads
back in one way only, whatever hyphens the variant holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dino_exp.errors import ConfigError, RefusedError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,63}")
VARIANT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?")
CONFIG_HASH = re.compile(r"c[1-9][0-9]*:[0-9a-f]{64}")
CODE_ID = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(
    rf"(?P<model>{MODEL_NAME.pattern})-(?P<config>[0-9a-f]{{8,64}})-(?P<code>[0-9a-f]{{8,64}})"
    rf"(?:-(?P<variant>{VARIANT.pattern}))?"
)
LENGTHS = (8, 16, 32, 64)  # tried in turn when another run already has the shorter name


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """The full identity behind a run's name.

    `config_hash` is `c<scheme>:<64 hex digits>`, `code_id` 64 hex digits. Raises ConfigError for any other
    text.
    """

    model: str
    config_hash: str
    code_id: str
    variant: str | None = None

    def __post_init__(self) -> None:
        _check("model.name", self.model, MODEL_NAME, "letters, digits, '_' and '.', no '-'")
        _check("config hash", self.config_hash, CONFIG_HASH, "'c1:' and 64 hex digits")
        _check("code identity", self.code_id, CODE_ID, "64 hex digits")
        if self.variant is not None:
            rule = "at most 64 letters, digits, '.', '_' and '-', a letter or digit first, no '.' or '-' last"
            _check("run.variant", self.variant, VARIANT, rule)

    def text(self, digits: int = 8) -> str:
        """The name of the run directory, with `digits` hex digits of each hash."""
        config_hex = self.config_hash.partition(":")[2]
        parts = [self.model, config_hex[:digits], self.code_id[:digits]]
        return "-".join([*parts, self.variant] if self.variant else parts)


@dataclass(frozen=True, kw_only=True)
class RunName:
    """What the text of a run key says: the hashes only as far as the name spells them."""

    model: str
    config_digits: str
    code_digits: str
    variant: str | None


def parse_run_key(text: str) -> RunName | None:
    """The parts of a run key's text; None when it is not one."""
    found = _KEY.fullmatch(text)
    if found is None or len(found["config"]) != len(found["code"]):
        return None
    return RunName(
        model=found["model"],
        config_digits=found["config"],
        code_digits=found["code"],
        variant=found["variant"],
    )


def choose_name(key: RunKey, holder: Callable[[str], tuple[str, str] | None]) -> str:
    """The name of the run that `key` has already; else the shortest that no other run has.

    `holder(name)` answers (config_hash, code_id) of the run of that name, or None where there is none yet.
    Raises RefusedError when even the full name is another run's (two hashing schemes, or a forged record).
    """
    holders = {name: holder(name) for name in map(key.text, LENGTHS)}
    ours = [name for name, held in holders.items() if held == (key.config_hash, key.code_id)]
    free = [name for name, held in holders.items() if held is None]
    if ours or free:
        return (ours or free)[0]
    name = key.text(LENGTHS[-1])
    raise RefusedError(
        f"run {name}: found a run of this full name that records the hashes {holders[name]}, expected "
        f"{(key.config_hash, key.code_id)}; keep both by setting `run.variant=<name>`"
    )


def _check(what: str, value: str, pattern: re.Pattern[str], rule: str) -> None:
    if not pattern.fullmatch(value):
        raise ConfigError(f"{what}: got {value!r}, expected {rule}")
