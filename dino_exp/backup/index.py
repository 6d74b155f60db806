"""`backup.json`: which files make up a backup. Written last, sealed, and read as something a stranger may have written.

Every file lies at the target under the path that it has in the run, with the beginning of its digest in its name. So
nothing at the target is ever replaced by other content, and an index stays true while the next one is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.layout import MAX_STEP, PACKS, PINS, is_pack_name, manifest_name
from dino_exp.checkpoint.manifest_parse import MAX_BYTES
from dino_exp.checkpoint.store import Identity
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError
from dino_exp.runs.key import parse_run_key
from dino_exp.runs.shape import WrongShapeError, flag, list_of, record_of, text, whole

INDEX = "backup.json"
PARTIAL = "backup.partial.json"  # what an unfinished backup has sent and read back; a restore does not look at it
FORMAT_VERSION = 1
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 200_000
NOT_COPIED = ("lock", "owner.json")  # of one machine
CHECKPOINTS = "checkpoints"
PINS_PATH = f"{CHECKPOINTS}/{PINS}"

_MAX_PARTS = 16
_MAX_NAME_BYTES = 200  # the digest comes on top of it, and a file system takes 255
_DIGITS = 16
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file: its path in the run, its content, and how the target described it when it was read back.

    `stamp` is compared and nothing else: while the target says the same, nobody has written the file anew.
    """

    path: str
    bytes: int
    sha256: str
    stamp: str

    def __post_init__(self) -> None:
        problem = path_problem(self.path)
        if problem is not None:
            raise ValueError(f"path {self.path[:80]!r}: {problem}")
        if self.bytes > MAX_BYTES:
            raise ValueError(f"{self.bytes} bytes, expected at most {MAX_BYTES}")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 {self.sha256[:80]!r}: expected 64 hex digits")

    @property
    def stored(self) -> str:
        """Its path below the backup's address."""
        return stored_path(self.path, self.sha256)


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """One checkpoint: which version of its manifest (`seal` ends the file), and the files that it is made of.

    `metrics_bytes` is how much of metrics.jsonl was written when it was saved.
    """

    step: int
    seal: str
    resumable: bool
    metrics_bytes: int
    manifest: StoredFile
    packs: tuple[StoredFile, ...]

    def __post_init__(self) -> None:
        if self.step > MAX_STEP or self.manifest.path != manifest_path(self.step):
            raise ValueError(f"step {self.step} does not belong to {self.manifest.path[:80]!r}")
        if not all(_is_pack(pack.path) for pack in self.packs):
            raise ValueError(f"step {self.step} names packs that are none")

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All of them, the manifest last."""
        return (*self.packs, self.manifest)

    @property
    def identity(self) -> Identity:
        """Which version of the manifest this is, as `Store.identity` says it."""
        return self.manifest.bytes, self.seal


@dataclass(frozen=True, kw_only=True)
class Index:
    """A whole backup. `attempts` name the processes that had worked on the run, oldest first.

    `retired`: what earlier backups of the run have brought and this one does not need. Only a file that an index
    names is ever removed, since others may keep theirs at the address.
    """

    run_key: str
    attempts: tuple[str, ...]
    made_at: str
    checkpoints: tuple[StoredCheckpoint, ...]
    files: tuple[StoredFile, ...]
    retired: tuple[StoredFile, ...] = ()

    def __post_init__(self) -> None:
        if parse_run_key(self.run_key) is None:
            raise ValueError(f"run_key {self.run_key[:80]!r} is none")
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        if steps != sorted(set(steps)):
            raise ValueError("checkpoints: expected steps that ascend")
        if any(f"{file.path}/".startswith(f"{CHECKPOINTS}/") and file.path != PINS_PATH for file in self.files):
            raise ValueError(f"files: expected those of {CHECKPOINTS}/ beside their step, except {PINS}")
        paths = _by_path(self.all_files())
        folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        if clash := folders & paths.keys():
            raise ValueError(f"{min(clash)[:80]!r} is a file and a folder")
        num_files = len(paths) + len(self.retired)
        if num_files > MAX_FILES:
            raise ValueError(f"{num_files} files, expected at most {MAX_FILES}")

    def all_files(self) -> list[StoredFile]:
        """Every file, some more than once: checkpoints may share packs. Packs come before manifests."""
        return [*(file for checkpoint in self.checkpoints for file in checkpoint.files), *self.files]

    def stored(self) -> dict[str, StoredFile]:
        """The files by where they lie at the target, each once."""
        return {file.stored: file for file in self.all_files()}

    def named(self) -> dict[str, StoredFile]:
        """The files and those that are retired, by where they lie."""
        return {**{file.stored: file for file in self.retired}, **self.stored()}


def manifest_path(step: int) -> str:
    """Where a step's manifest lies in a run."""
    return f"{CHECKPOINTS}/{manifest_name(step)}"


def pack_path(name: str) -> str:
    """Where a pack lies in a run."""
    return f"{CHECKPOINTS}/{PACKS}/{name}"


def stored_path(path: str, sha256: str) -> str:
    """Where content with this digest of the file at `path` lies: `logs/train.log` as `logs/train.0123456789abcdef.log`.

    What follows the last dot of the name stays at its end, so that every tool knows what kind of file it is.
    """
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not stem:
        stem, dot, extension = name, "", ""
    return f"{folder}{slash}{stem}.{sha256[:_DIGITS]}{dot}{extension}"


def path_problem(path: str) -> str | None:
    """Why a file of this path in a run is not copied; None where nothing is wrong with it.

    A path leads down from the run's directory, in printable names, and to nothing that a program of ours would take
    for its own when it finds it there.
    """
    parts = path.split("/")
    if len(parts) > _MAX_PARTS:
        return f"{len(parts)} names deep, expected at most {_MAX_PARTS}"
    for part in parts:
        if part in ("", ".", ".."):
            return "leads elsewhere, expected a path below the run's directory"
        if not part.isprintable() or "\\" in part or len(part.encode()) > _MAX_NAME_BYTES:
            return f"expected names of printable characters without backslash, at most {_MAX_NAME_BYTES} bytes each"
        if part.startswith(".") and part.endswith(".tmp"):
            return "a leftover of a writer"
    if path in NOT_COPIED or parts[0] in NOT_COPIED:
        return "says who works on the run, on this machine"
    return None


def index_to_bytes(index: Index) -> bytes:
    """The sealed file."""
    return seal({"format_version": FORMAT_VERSION, **asdict(index)})


def parse_index(data: bytes, what: str) -> Index:
    """The index in the bytes of a file, everything in it bounded.

    Raises CorruptCheckpointError, UnsupportedFormatError for one of a newer version.
    """
    body = unseal(data, what)
    version = body.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise CorruptCheckpointError(f"{what}: format_version is {str(version)[:40]!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"{what}: format {str(version)[:40]}, expected at most {FORMAT_VERSION}; it is of a newer version, "
            "so install that one to read it"
        )
    try:
        return _INDEX(body)
    except WrongShapeError as error:
        raise CorruptCheckpointError(f"{what}: {error}") from error


def _by_path(files: Iterable[StoredFile]) -> dict[str, str]:
    """The digest of each path. Raises ValueError where two contents claim one."""
    found: dict[str, str] = {}
    for file in files:
        if found.setdefault(file.path, file.sha256) != file.sha256:
            raise ValueError(f"{file.path[:80]!r} comes with two contents")
    return found


def _is_pack(path: str) -> bool:
    return path == pack_path(name := path.rpartition("/")[2]) and is_pack_name(name)


_FILE = record_of(StoredFile, {"path": text, "bytes": whole, "sha256": text, "stamp": text})
_CHECKPOINT = record_of(
    StoredCheckpoint,
    {
        "step": whole, "seal": text, "resumable": flag, "metrics_bytes": whole, "manifest": _FILE,
        "packs": list_of(_FILE),
    },
)  # fmt: skip
_INDEX = record_of(
    Index,
    {
        "run_key": text, "attempts": list_of(text), "made_at": text, "checkpoints": list_of(_CHECKPOINT),
        "files": list_of(_FILE), "retired": list_of(_FILE),
    },
)  # fmt: skip
