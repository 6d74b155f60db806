"""Which code a run ran: an identity of the package's files, and what git knows about them.

The only module that uses GitPython. It only reads: the user's index, objects and references do not change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from dino_exp.fsio import DamagedFileError, make_dirs, read_json_bounded, write_atomic
from dino_exp.runs.code_archive import MAX_PATCH_BYTES, BoundedBuffer, Untracked, pack_untracked
from dino_exp.runs.jsontext import Json, pretty
from dino_exp.runs.redact import strip_credentials

if TYPE_CHECKING:
    from git import Git

# Some commands refresh the index on the side, and a partial clone fetches objects, unless told not to.
_READ_ONLY = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
# The user's settings for colours, prefixes and external tools would make a patch that `git apply` refuses.
_DIFF = (
    *("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short"),
)
PACKAGE_DIR = Path(__file__).parents[1]
_NOTHING = Untracked(archive=None, files=[], left_out=[])


@dataclass(frozen=True, kw_only=True)
class CodeRecord:
    """The code of one attempt. What git cannot tell is None; `note` says why, and what is unusual.

    `dirty`: a tracked file differs from the commit, or the package holds an untracked file.
    """

    id: str
    commit: str | None = None
    dirty: bool | None = None
    branch: str | None = None
    remote: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _Code:
    """A record with the bytes that belong to it."""

    record: CodeRecord
    package: str | None = None  # the package's path in the repository
    patch: BoundedBuffer | None = None
    untracked: Untracked = _NOTHING


class _NoGitError(Exception):
    """Git can say nothing about the package; the text says why."""


def code_id(package_dir: Path) -> str:
    """SHA-256 (hex) of the `*.py` files below `package_dir`: their POSIX paths and contents, sorted by path.

    The same for a clean and a dirty working tree and for an installed package. Raises FileNotFoundError
    without any such file.
    """
    tree = hashlib.sha256()
    paths = [path.relative_to(package_dir) for path in package_dir.rglob("*.py") if path.is_file()]
    names = sorted(path.as_posix() for path in paths if "__pycache__" not in path.parts)
    if not names:
        raise FileNotFoundError(f"{package_dir}: no *.py file; expected a Python package")
    for name in names:
        content = hashlib.sha256((package_dir / name).read_bytes()).hexdigest()
        tree.update(os.fsencode(name) + f"\0{content}\n".encode())
    return tree.hexdigest()


def record_code(package_dir: Path, into: Path, *, attempt: int = 1, leave_out: Path | None = None) -> CodeRecord:
    """Write `git.json`, `code.patch` and `untracked.tar.gz` of the code in `package_dir`.

    `into` is the run's `code/` folder. The first attempt's record lies in it and is never replaced; a later
    attempt's goes to `attempts/NNN`, only when it differs from the newest there. Files below `leave_out` (the
    outputs) are not looked at. Everything that git cannot tell is said in `note`; only the disk raises
    (OSError).
    """
    code = _examine(package_dir.resolve(), leave_out)
    described = _describe(code)
    newest = _newest(into)
    if newest is None or newest != described:
        _write(code, described, into if newest is None else into / "attempts" / f"{attempt:03d}")
    return code.record


def ask_git(folder: Path, *words: str) -> str | None:
    """What git prints about the repository around `folder`; None when it refuses, or is not there. It only reads."""
    try:
        return _ask(_git(folder), *words)
    except _NoGitError:
        return None


def _examine(package_dir: Path, leave_out: Path | None) -> _Code:
    identity = code_id(package_dir)
    try:
        return _examine_repository(_git(package_dir), package_dir, identity, leave_out)
    except _NoGitError as reason:
        return _Code(record=CodeRecord(id=identity, note=str(reason)))


def _git(package_dir: Path) -> Git:
    if shutil.which("git") is None:
        raise _NoGitError("no git binary")
    if "GIT_DIR" in os.environ:  # git would answer about that repository, whatever folder it is asked in
        raise _NoGitError("GIT_DIR is set in the environment, so the package's own repository was not asked")
    try:
        from git import Git
    except ImportError as error:
        raise _NoGitError(f"GitPython cannot be used: {error}") from error
    return Git(package_dir)


def _ask(git: Git, *words: str) -> str | None:
    """What git prints, without the last line feed; None when it refuses."""
    from git.exc import CommandError

    try:
        printed = git.execute(["git", *words], env=_READ_ONLY, stdout_as_string=False)
    except CommandError:
        return None
    return os.fsdecode(printed)


def _examine_repository(git: Git, package_dir: Path, identity: str, leave_out: Path | None) -> _Code:
    top = _ask(git, "rev-parse", "--show-toplevel")
    if top is None:
        raise _NoGitError(_why_no_repository(package_dir))
    if not _ask(git, "ls-files", "-z", "--", "*.py"):
        raise _NoGitError("the package is not tracked by the repository around it")
    commit = _ask(git, "rev-parse", "--verify", "--quiet", "HEAD^{commit}") or None
    branch = _ask(git, "symbolic-ref", "--quiet", "--short", "HEAD") or None
    # With no commit yet, everything in the index is a change against the empty tree.
    against = commit or _ask(git, "hash-object", "-t", "tree", os.devnull)
    patch = _diff(git, package_dir, against, top) if against else None
    package = (_ask(git, "rev-parse", "--show-prefix") or "").rstrip("/")
    names = _untracked_names(git, Path(top), package, leave_out)
    is_changed = patch is None or patch.num_bytes > 0 or commit is None
    record = CodeRecord(
        id=identity,
        commit=commit,
        dirty=is_changed or any(_is_below(name, package) for name in names),
        branch=branch,
        remote=_remote(git),
        note="; ".join(_notes(git, package_dir, commit, branch, patch)),
    )
    return _Code(record=record, package=package, patch=patch, untracked=pack_untracked(Path(top), names))


def _why_no_repository(package_dir: Path) -> str:
    if any((folder / ".git").exists() for folder in (package_dir, *package_dir.parents)):
        return "git refuses the repository around the package; `git status` there says why"
    return "not in a git repository"


def _diff(git: Git, package_dir: Path, against: str, top: str) -> BoundedBuffer | None:
    """The change of the whole working tree against a commit or tree; None when git fails.

    `git diff` refreshes the index, whatever GIT_OPTIONAL_LOCKS says; it is given a copy to refresh.
    """
    from git.exc import CommandError

    patch = BoundedBuffer(MAX_PATCH_BYTES)
    index = _ask(git, "rev-parse", "--git-path", "index") or ""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "index"
        shutil.copyfile(package_dir / index, copy)
        environment = {**_READ_ONLY, "GIT_INDEX_FILE": str(copy)}
        try:
            words = ["git", "-C", top, *_DIFF, against, "--"]
            git.execute(words, env=environment, output_stream=cast(BinaryIO, patch))
        except CommandError:
            return None
    return patch


def _untracked_names(git: Git, top: Path, package: str, leave_out: Path | None) -> list[str]:
    """Untracked, not ignored files, those of the package first, so that the cap meets them last."""
    printed = _ask(git, "-C", str(top), "ls-files", "-z", "--others", "--exclude-standard") or ""
    names = [name for name in printed.split("\0") if name]
    if leave_out is not None:
        hidden = leave_out.resolve()
        names = [name for name in names if not (top / name).is_relative_to(hidden)]
    return sorted(names, key=lambda name: (not _is_below(name, package), name))


def _is_below(name: str, package: str) -> bool:
    return package == "" or name.startswith(f"{package}/")


def _remote(git: Git) -> str | None:
    """The address of `origin`, or of the first remote, as configured: `insteadOf` could add a password."""
    remotes = (_ask(git, "remote") or "").split()
    if not remotes:
        return None
    name = "origin" if "origin" in remotes else remotes[0]
    address = _ask(git, "config", "--get", f"remote.{name}.url")
    return strip_credentials(address) if address else None


def _notes(
    git: Git, package_dir: Path, commit: str | None, branch: str | None, patch: BoundedBuffer | None
) -> list[str]:
    num_bytes = 0 if patch is None else patch.num_bytes
    folders = (_ask(git, "rev-parse", "--git-dir", "--git-common-dir") or "").splitlines()
    said = {
        "no commit yet": commit is None,
        "detached HEAD": commit is not None and branch is None,
        "linked worktree": len({(package_dir / folder).resolve() for folder in folders}) == 2,
        "submodule": bool(_ask(git, "rev-parse", "--show-superproject-working-tree")),
        "no patch: git diff failed": patch is None,
        f"no patch: {num_bytes} bytes, at most {MAX_PATCH_BYTES} are kept": num_bytes > MAX_PATCH_BYTES,
    }
    return [text for text, holds in said.items() if holds]


def _describe(code: _Code) -> dict[str, Json]:
    patch: Json = None
    if content := _patch_bytes(code):
        patch = {"file": "code.patch", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record: dict[str, Json] = asdict(code.record)
    return {
        "format": 1,
        **record,
        "package": code.package,
        "patch": patch,
        "untracked": code.untracked.as_json(),
    }


def _patch_bytes(code: _Code) -> bytes:
    """The patch, empty when there is none to keep."""
    return (code.patch.content() if code.patch else None) or b""


def _newest(into: Path) -> Mapping[str, Json] | None:
    """The newest description below `into`; None for none, and an empty one for one that cannot be read."""
    found = [*into.glob("git.json"), *sorted(into.glob("attempts/[0-9][0-9][0-9]*/git.json"), key=_attempt)]
    if not found:
        return None
    try:
        described = read_json_bounded(found[-1])
    except DamagedFileError:
        return {}
    return described if isinstance(described, dict) else {}


def _attempt(path: Path) -> tuple[int, str]:
    return len(path.parent.name), path.parent.name  # 999 comes before 1000


def _write(code: _Code, described: Mapping[str, Json], folder: Path) -> None:
    """Bytes first, the description last: `git.json` names only what is there."""
    make_dirs(folder)
    if content := _patch_bytes(code):
        write_atomic(folder / "code.patch", content)
    if code.untracked.archive is not None:
        write_atomic(folder / "untracked.tar.gz", code.untracked.archive)
    write_atomic(folder / "git.json", pretty(described))
