"""The checkpoints folder of one run: committing, forgetting, quarantining and sweeping, in an order that is
safe to stop at any point.

A pack is durable before its manifest is renamed into place (the commit); a manifest is durably gone before
its packs are removed. What a dead writer leaves is therefore never listed, and is swept by the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from dino_exp.checkpoint.canonical import SEAL_BYTES, canonical_json, seal_digest
from dino_exp.checkpoint.layout import (
    PACKS,
    QUARANTINE,
    is_leftover,
    is_pack_name,
    manifest_name,
    parse_manifest_name,
    parse_pack_name,
    parse_trash_name,
    temporary_name,
    trash_name,
)
from dino_exp.checkpoint.manifest import Manifest, manifest_to_bytes
from dino_exp.checkpoint.manifest_parse import MAX_MANIFEST_BYTES, parse_manifest
from dino_exp.errors import CheckpointError, CorruptCheckpointError, ManifestTooLargeError
from dino_exp.fsio import LOCAL, DamagedFileError, Files

Identity = tuple[int, str]  # size of a manifest's file and the digest at its end: which version of it this is


class Store:
    """Files of one checkpoints folder.

    Reading methods change nothing and work on a folder that does not exist.
    """

    def __init__(self, folder: Path, files: Files = LOCAL) -> None:
        self.folder = folder
        self.files = files
        self.packs_folder = folder / PACKS

    @property
    def _folders(self) -> tuple[Path, Path, Path]:
        return self.folder, self.packs_folder, self.folder / QUARANTINE

    def refuse_links(self) -> None:
        """Raises CorruptCheckpointError if one of the folders is a link: who sent it would choose where files go."""
        for path in self._folders:
            if path.is_symlink():
                raise CorruptCheckpointError(
                    f"{path} is a link; a run's files must lie inside it. Replace it by the folder it names"
                )

    def prepare(self) -> None:
        """Make the folders (the run's folder exists). Raises CorruptCheckpointError as `refuse_links`, OSError."""
        self.refuse_links()
        for path in self._folders:
            self.files.mkdir(path)

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        found = (parse_manifest_name(name) for name in self.files.listdir(self.folder))
        return sorted(step for step in found if step is not None)

    def manifest_path(self, step: int) -> Path:
        """Where a step's manifest lies."""
        return self.folder / manifest_name(step)

    def identity(self, step: int) -> Identity | None:
        """Which version of a manifest is on disk, from its last bytes; None when it is torn or no file."""
        try:
            with self.files.open_read(self.manifest_path(step)) as handle:
                tail = bytearray(SEAL_BYTES)
                handle.read_into(max(handle.num_bytes - SEAL_BYTES, 0), memoryview(tail))
        except (DamagedFileError, FileNotFoundError):
            return None
        digest = seal_digest(bytes(tail))
        return None if digest is None else (handle.num_bytes, digest)

    def read(self, step: int, *, with_tensors: bool = True) -> tuple[Manifest, Identity]:
        """A step's manifest.

        Raises CorruptCheckpointError, UnsupportedFormatError, FileNotFoundError, OSError.
        """
        path = self.manifest_path(step)
        try:
            data = self.files.read_bytes(path, MAX_MANIFEST_BYTES)
        except DamagedFileError as damage:
            raise CorruptCheckpointError(str(damage)) from damage
        manifest = parse_manifest(data, path.name, with_tensors=with_tensors)
        if manifest.step != step:
            raise CorruptCheckpointError(f"{path.name} describes step {manifest.step}, expected {step}")
        digest = seal_digest(data[-SEAL_BYTES:])
        assert digest is not None
        return manifest, (len(data), digest)

    def new_pack_path(self, name: str) -> Path:
        """Where to write a pack of a step that is not committed; what a failed save left there is removed."""
        path = self.packs_folder / name
        self._remove(path)
        return path

    def commit(self, manifest: Manifest, guard: Callable[[], object] | None = None, *, supersede: bool = False) -> None:
        """Make a checkpoint of packs that are synced. `guard` may raise to prevent it at the last moment.

        Raises CheckpointError if the step is taken and not to be superseded, OSError. When it raises, the step is
        not listed, unless even taking it back failed; one that was to be superseded is still there, old or new.
        """
        target = self.manifest_path(manifest.step)
        temporary = self.folder / temporary_name(target.name)
        data = manifest_to_bytes(manifest)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestTooLargeError(f"{target.name}: {len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}")
        try:
            parse_manifest(data, target.name)
        except CorruptCheckpointError as problem:  # what nobody could read is not committed
            raise CheckpointError(f"this state cannot be saved: {problem}") from problem
        self.files.sync_dir(self.packs_folder)
        try:
            self._write_manifest(temporary, data)
            if guard is not None:
                guard()
            if not supersede and self.files.size(target) is not None:
                raise CheckpointError(f"{target} exists already; a committed checkpoint is never overwritten")
            self.files.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove(temporary)
            raise
        try:
            self.files.sync_dir(self.folder)
        except OSError:
            if not supersede:
                self._remove(target)  # not known to be durable, so it must not be listed either
            raise

    def _write_manifest(self, path: Path, data: bytes) -> None:
        self._remove(path)  # of a save that failed and could not tidy up
        with self.files.create(path) as handle:
            handle.write(data)
            handle.sync()

    def take_back(self, step: int, packs: Iterable[str]) -> None:
        """Remove the packs of a failed save, as far as the disk allows; the next sweep takes the rest."""
        with contextlib.suppress(OSError):
            if self.files.size(self.manifest_path(step)) is None:
                self.files.sync_dir(self.folder)  # if this fails a manifest may come back, so the packs stay
                for pack in packs:
                    self._remove(self.packs_folder / pack)

    def hide(self, step: int) -> None:
        """Begin to drop a checkpoint: from now on it is not listed."""
        self.files.replace(self.manifest_path(step), self.folder / trash_name(step))

    def hidden_steps(self) -> list[int]:
        """Steps that a dead process had begun to drop, and that are not there anew, ascending."""
        hidden = {step for name in self.files.listdir(self.folder) if (step := parse_trash_name(name)) is not None}
        return sorted(hidden - set(self.steps()))

    def unhide(self, step: int) -> None:
        """Think better of dropping a checkpoint that was hidden, and nothing more."""
        self.files.replace(self.folder / trash_name(step), self.manifest_path(step))
        self.files.sync_dir(self.folder)  # or the next start may find it hidden, and sweep it

    def erase(self, step: int, packs: Iterable[str]) -> None:
        """Finish to drop a hidden checkpoint, with those packs that nothing else reaches."""
        self.files.sync_dir(self.folder)  # its manifest must be gone for good before its packs are
        self.remove_packs(packs)
        self._remove(self.folder / trash_name(step))

    def remove_packs(self, packs: Iterable[str]) -> None:
        """Remove packs that no manifest on the disk reaches any more."""
        for pack in packs:
            self._remove(self.packs_folder / pack)

    def sweep(self, reached: Collection[str] | None) -> list[str]:
        """Remove what dead writers left, and packs not `reached` (None: no pack at all); return the names."""
        leftovers = [name for name in self.files.listdir(self.folder) if is_leftover(name)]
        for name in leftovers:
            self._remove(self.folder / name)
        orphans = [] if reached is None else [name for name in self.packs() if name not in reached]
        if orphans:
            self.files.sync_dir(self.folder)  # their manifests must be gone for good before they are
        for name in orphans:
            self._remove(self.packs_folder / name)
        return leftovers + orphans

    def quarantine(self, step: int, packs: Iterable[str], reason: str) -> Path:
        """Move a damaged checkpoint aside, with the reason.

        Packs first: a sweep must not find them without owner.
        """
        home = self.folder / QUARANTINE
        taken = set(self.files.listdir(home))
        stem = manifest_name(step).removesuffix(".json")
        folder = next(home / name for n in range(1, 10**6) if (name := f"{stem}.q{n:03d}") not in taken)
        self.files.mkdir(folder)
        try:
            with self.files.create(folder / "reason.json") as handle:
                handle.write(canonical_json({"step": step, "reason": reason}) + b"\n")
        except OSError:  # a full disk: the next try makes another folder
            with contextlib.suppress(OSError):
                self._remove(folder / "reason.json")
                self.files.rmdir(folder)
            raise
        for pack in packs:
            self._move(self.packs_folder / pack, folder / pack)
        self._move(self.manifest_path(step), folder / manifest_name(step))
        self.files.sync_dir(folder)
        self.files.sync_dir(self.folder)
        return folder

    def packs(self) -> list[str]:
        """Packs on disk, whether a manifest names them or not."""
        return [name for name in self.files.listdir(self.packs_folder) if is_pack_name(name)]

    def packs_of_step(self, step: int) -> list[str]:
        """Those that were written for a step."""
        return [name for name in self.packs() if (parts := parse_pack_name(name)) is not None and parts.step == step]

    def _remove(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.files.unlink(path)
            return True
        return False

    def _move(self, source: Path, target: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.replace(source, target)
