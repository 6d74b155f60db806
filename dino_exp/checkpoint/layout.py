"""What a checkpoints folder's files are called: the one place that builds and parses their names.

registry.json                                   derived index
pins.json                                       pinned steps with notes
pins.lock                                       empty: held while pins are changed
step-000000120.json                             a manifest: this file is the checkpoint
packs/step-000000120.a003.r00000.safetensors    tensor bytes of step 120 by attempt 3, rank 0
packs/step-000000120.a003.r00000.g001.safetensors   the same, written anew when the checkpoint was made smaller
quarantine/step-000000120.q001/                 what failed verification, with reason.json
.step-000000120.json.tmp, .trash-step-…         leftovers of a writer that died, swept by the next
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REGISTRY = "registry.json"
PINS = "pins.json"
PINS_LOCK = "pins.lock"
PACKS = "packs"
QUARANTINE = "quarantine"

MAX_STEP = 10**9 - 1
_MANIFEST = re.compile(r"step-(\d{9})\.json", re.ASCII)
_PACK = re.compile(  # one name for one pack: no more leading zeros than its width asks for, and `.g000` is none
    r"step-(\d{9})\.a(\d{3}|[1-9]\d{3,5})\.r(\d{5})(?:\.g((?!000)\d{3}|[1-9]\d{3,5}))?\.safetensors", re.ASCII
)
_LEFTOVER = re.compile(r"\.(?:step-\d{9}\.json|registry\.json|pins\.json)\.tmp|\.trash-step-\d{9}\.json", re.ASCII)


@dataclass(frozen=True, order=True)
class PackName:
    """Which step, attempt and rank wrote a pack, and how often it was written anew since."""

    step: int
    attempt: int
    rank: int
    generation: int = 0

    def __str__(self) -> str:
        anew = f".g{self.generation:03d}" if self.generation else ""
        return f"step-{self.step:09d}.a{self.attempt:03d}.r{self.rank:05d}{anew}.safetensors"


def manifest_name(step: int) -> str:
    """The file name of a step's manifest."""
    assert 0 <= step <= MAX_STEP, step
    return f"step-{step:09d}.json"


def parse_manifest_name(name: str) -> int | None:
    """The step of a manifest's file name; None for any other name."""
    found = _MANIFEST.fullmatch(name)
    return int(found[1]) if found else None


def is_pack_name(name: str) -> bool:
    """Whether a pack is called so; no such name leads out of the folder."""
    return _PACK.fullmatch(name) is not None


def parse_pack_name(name: str) -> PackName | None:
    """The parts of a pack's file name; None for any other name."""
    found = _PACK.fullmatch(name)
    return PackName(*map(int, found.groups("0"))) if found else None


def pack_step(name: str) -> int | None:
    """The step that a pack was written for; None for a name that is none of a pack."""
    parts = parse_pack_name(name)
    return None if parts is None else parts.step


def temporary_name(name: str) -> str:
    """Where a file is written before it is renamed into place."""
    return f".{name}.tmp"


def trash_name(step: int) -> str:
    """Where a manifest goes in the first moment of being dropped."""
    return f".trash-{manifest_name(step)}"


def parse_trash_name(name: str) -> int | None:
    """The step of a manifest that is being dropped; None for any other name."""
    return parse_manifest_name(name.removeprefix(".trash-")) if name.startswith(".trash-") else None


def is_leftover(name: str) -> bool:
    """Whether this is a file of a writer that died, safe to remove."""
    return _LEFTOVER.fullmatch(name) is not None
