"""The recorded code of a run as files again: its commit, its patch, its untracked files, checked against `code_id`."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError, read_json_bounded
from dino_exp.runs.code_identity import PACKAGE_DIR, ask_git, code_id
from dino_exp.runs.shape import WrongShapeError, anything, list_of, map_of, optional, text

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_PACKAGE = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*")
_TIMEOUT_SECS = 600
# Nothing of the user's repository is to run: no hook, no prompt, no helper of a remote.
_QUIET = ("-c", "core.hooksPath=/dev/null", "-c", "protocol.allow=never", "-c", "protocol.file.allow=always")


@dataclass(frozen=True, kw_only=True)
class RecordedCode:
    """What `code/git.json` says, checked. `package` is the package's path in the repository."""

    folder: Path
    id: str
    commit: str | None
    package: str | None
    has_patch: bool
    untracked: tuple[str, ...]

    def describe(self) -> list[tuple[str, str]]:
        """What would be run, for whoever has to trust it."""
        patch = self.folder / "code.patch"
        return [
            ("commit", self.commit or "– (none)"),
            ("patch", f"{patch} ({patch.stat().st_size:,} bytes)" if self.has_patch else "–"),
            ("not tracked", ", ".join(self.untracked) or "–"),
            ("code", self.id),
        ]


def recorded_code(folder: Path) -> RecordedCode:
    """The code of a run's first attempt. Raises DamagedFileError, FileNotFoundError."""
    path = folder / "git.json"
    found = read_json_bounded(path)
    try:
        members = map_of(anything)(found)
        commit, package = optional(text)(members.get("commit")), optional(text)(members.get("package"))
        files = map_of(anything)(members.get("untracked")).get("files")
        names = tuple(text(map_of(anything)(file).get("path")) for file in list_of(anything)(files))
        identity = text(members.get("id"))
    except WrongShapeError as error:
        raise DamagedFileError(f"{path}: {error}") from error
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise DamagedFileError(f"{path}: commit is {commit[:80]!r}, expected 40 or 64 hex digits")
    if package is not None and (not _PACKAGE.fullmatch(package) or ".." in package.split("/")):
        raise DamagedFileError(f"{path}: package is {package[:80]!r}, expected a path inside the repository")
    has_patch = members.get("patch") is not None
    return RecordedCode(
        folder=folder, id=identity, commit=commit, package=package, has_patch=has_patch, untracked=names
    )


def rebuild_code(code: RecordedCode, into: Path) -> Path:
    """Make the files anew below `into`, from the repository around this package; the folder to import from.

    The user's repository, its index and its worktree do not change. Where this program is that code already, it is
    used as it is. Raises RefusedError where the code cannot be had or comes out as other code.
    """
    if code_id(PACKAGE_DIR) == code.id:
        return PACKAGE_DIR.parent
    top = ask_git(PACKAGE_DIR, "rev-parse", "--show-toplevel")
    if code.commit is None or code.package is None or top is None:
        raise RefusedError(
            f"{code.folder}: the code was not in a git repository, or this program is not; it can only be reproduced "
            f"by an installation whose code_id is {code.id}"
        )
    if ask_git(PACKAGE_DIR, "cat-file", "-e", f"{code.commit}^{{commit}}") is None:
        raise RefusedError(f"{top} does not know commit {code.commit}; fetch it there: `git -C {top} fetch --all`")
    _git("clone", "--quiet", "--shared", "--no-checkout", top, str(into))
    _git("-C", str(into), "checkout", "--quiet", "--detach", code.commit)
    if code.has_patch:
        _git("-C", str(into), "apply", "--whitespace=nowarn", str((code.folder / "code.patch").resolve()))
    if code.untracked:
        _unpack(code.folder / "untracked.tar.gz", into)
    package = into / code.package
    found = code_id(package) if package.is_dir() else "none"
    if found != code.id:
        raise RefusedError(
            f"{code.folder}: commit, patch and untracked files make the code {found}, the run had {code.id}; "
            "a patch or a file that was too large to keep is missing"
        )
    return package.parent


def _unpack(archive: Path, into: Path) -> None:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(into, filter="data")  # no absolute path, no link that leads out, no device
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise RefusedError(f"{archive}: cannot be unpacked: {problem}") from problem


def _git(*words: str) -> None:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1"}
    done = subprocess.run(
        ["git", *_QUIET, *words], env=environment, check=False, capture_output=True, text=True, timeout=_TIMEOUT_SECS
    )
    if done.returncode != 0:
        raise RefusedError(f"git {words[0] if words[0] != '-C' else words[2]}: {done.stderr.strip()[:500]}")
