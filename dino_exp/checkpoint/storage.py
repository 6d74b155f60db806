"""How states are written: plain values. No torch, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dino_exp.errors import ConfigError

CODECS = ("raw", "zstd", "delta")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What to do to tensors on their way to the disk. All of it is lossless.

    `codec`: "raw" writes ordinary safetensors files; "zstd" compresses, each checkpoint for itself; "delta" writes what
    changed since the checkpoint before, through at most `max_chain` of them, and what did not change not at all.
    `threads` encode beside the one that writes; 0 for none. `companions`: by prefix of a name, the prefix of a tensor
    that resembles it, such as `{"teacher.": "student."}`; no tensor has a companion that has one itself.

    Raises ConfigError.
    """

    codec: str = "raw"
    max_chain: int = 5
    threads: int = 0
    companions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ConfigError(f"checkpoint.storage.codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if not 1 <= self.max_chain <= 20:
            raise ConfigError(f"checkpoint.storage.max_chain must be from 1 to 20, got {self.max_chain}")
        if self.threads < 0:
            raise ConfigError(f"checkpoint.storage.threads must be at least 0, got {self.threads}")
        if any(self.companion_of(other) is not None for other in self.companions.values()):
            raise ConfigError(f"a companion has a companion itself: {dict(self.companions)}")

    def companion_of(self, name: str) -> str | None:
        """The name of the tensor that may resemble the one of this name; there may be none such."""
        for prefix, other in self.companions.items():
            if name.startswith(prefix):
                return other + name.removeprefix(prefix)
        return None

    def is_companion(self, name: str) -> bool:
        """Whether others may resemble the tensor of this name."""
        return any(name.startswith(prefix) for prefix in self.companions.values())


RAW_STORAGE = Storage()
