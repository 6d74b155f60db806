"""Which code a run ran: an identity of the package's files, and what git knows about them.

The only module that uses GitPython. It only reads: the user's index, objects and references do not change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from dino_exp.fsio import DamagedFileError, make_dirs, read_json_bounded, write_atomic
from dino_exp.runs.code_archive import MAX_PATCH_BYTES, BoundedBuffer, Untracked, pack_untracked
from dino_exp.runs.code_tree import not_as_held, parse_tree, python_files
from dino_exp.runs.jsontext import Json, pretty
from dino_exp.runs.redact import is_secret_file, strip_credentials
from dino_exp.runs.signature import NAME as SIGNATURE

if TYPE_CHECKING:
    from git import Git

# Some commands refresh the index on the side, and a partial clone fetches objects, unless told not to.
# The rest of what git takes from the environment gives patterns and patches another meaning.
_READ_ONLY = {
    "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_DIFF_OPTS": "",
    "GIT_LITERAL_PATHSPECS": "0", "GIT_GLOB_PATHSPECS": "0", "GIT_NOGLOB_PATHSPECS": "0", "GIT_ICASE_PATHSPECS": "0",
}  # fmt: skip
# The user's settings for colours, prefixes, context and external tools would make a patch that `git apply` refuses.
_DIFF = (
    *("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--unified=3", "--inter-hunk-context=0"),
)
_MAX_NAMED = 5  # files in a note
PACKAGE_DIR = Path(__file__).parents[1]
_NOTHING = Untracked(archive=None, files=[], left_out=[])


@dataclass(frozen=True, kw_only=True)
class CodeRecord:
    """The code of one attempt. What git cannot tell is None; `note` says why, and what is unusual.

    `dirty`: a tracked file differs from the commit, or a file of the package is not as the commit has it.
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
    patch: bytes = b""  # empty when there is none to keep
    untracked: Untracked = _NOTHING


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What git tells of the working tree against the commit. `patch` is None where git failed.

    `status`: "A", "D", "M" or another of git's letters for every file that differs, by its path in the repository;
    those in `secret` are not in the patch.
    """

    patch: BoundedBuffer | None = None
    status: Mapping[str, str] = field(default_factory=dict)
    secret: tuple[str, ...] = ()

    def content(self) -> bytes:
        """The patch; empty when there is none to keep."""
        return (self.patch.content() if self.patch else None) or b""


class _NoGitError(Exception):
    """Git can say nothing about the package; the text says why."""


def code_id(package_dir: Path) -> str:
    """SHA-256 (hex) of the `*.py` files below `package_dir`: their POSIX paths and contents, sorted by path.

    The same for a clean and a dirty working tree and for an installed package. Raises FileNotFoundError
    without any such file.
    """
    tree = hashlib.sha256()
    names = python_files(package_dir)
    if not names:
        raise FileNotFoundError(f"{package_dir}: no *.py file; expected a Python package")
    for name in names:
        content = hashlib.sha256((package_dir / name).read_bytes()).hexdigest()
        tree.update(os.fsencode(name) + f"\0{content}\n".encode())
    return tree.hexdigest()


def record_code(
    package_dir: Path,
    into: Path,
    *,
    attempt: int = 1,
    leave_out: Collection[Path] = (),
    sign: Callable[[bytes], str | None] = lambda _: None,
) -> CodeRecord:
    """Write `git.json`, `code.patch` and `untracked.tar.gz` of the code in `package_dir`.

    `into` is the run's `code/` folder. The first attempt's record lies in it and is never replaced; a later attempt's
    goes to `attempts/NNN`, only when it differs from the newest there. Files below a folder in `leave_out` (the
    outputs) are not looked at, unless the package lies in it. `sign` gives the signature of a `git.json`, which is
    written beside it. Everything that git cannot tell is said in `note`; only the disk raises (OSError).
    """
    package_dir = package_dir.resolve()
    code = _examine(package_dir, [one for one in leave_out if not package_dir.is_relative_to(one.resolve())])
    described = _describe(code)
    newest = _newest(into)
    if newest is None or newest != described:
        _write(code, described, into if newest is None else into / "attempts" / f"{attempt:03d}", sign)
    return code.record


def ask_git(folder: Path, *words: str) -> str | None:
    """What git prints about the repository around `folder`; None when it refuses, or is not there. It only reads."""
    try:
        return _ask(_git(folder), *words)
    except _NoGitError:
        return None


def _examine(package_dir: Path, leave_out: Collection[Path]) -> _Code:
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


def _examine_repository(git: Git, package_dir: Path, identity: str, leave_out: Collection[Path]) -> _Code:
    top = _ask(git, "rev-parse", "--show-toplevel")
    if top is None:
        raise _NoGitError(_why_no_repository(package_dir))
    if not _ask(git, "ls-files", "-z", "--", "*.py"):
        raise _NoGitError("the package is not tracked by the repository around it")
    commit = _ask(git, "rev-parse", "--verify", "--quiet", "HEAD^{commit}") or None
    branch = _ask(git, "symbolic-ref", "--quiet", "--short", "HEAD") or None
    # With no commit yet, everything in the index is a change against the empty tree.
    against = commit or _ask(git, "hash-object", "-t", "tree", os.devnull)
    change = _diff(git, package_dir, against, top) if against else _Change()
    package = (_ask(git, "rev-parse", "--show-prefix") or "").rstrip("/")
    unheld, absent = _unheld(git, package_dir, package, against, change)
    names = _untracked_names(git, Path(top), leave_out)
    wanted = sorted({*names, *unheld}, key=lambda name: (name not in unheld, not _is_below(name, package), name))
    untracked = pack_untracked(Path(top), wanted, code=unheld)
    is_changed = change.patch is None or change.patch.num_bytes > 0 or bool(change.secret) or commit is None
    notes = _notes(git, package_dir, commit, branch, change.patch)
    notes += _notes_on_files(change, absent, [name for name in untracked.names_left_out() if name in unheld])
    record = CodeRecord(
        id=identity,
        commit=commit,
        dirty=is_changed or bool(unheld or absent) or any(_is_below(name, package) for name in names),
        branch=branch,
        remote=_remote(git),
        note="; ".join(notes),
    )
    return _Code(record=record, package=package, patch=change.content(), untracked=untracked)


def _why_no_repository(package_dir: Path) -> str:
    if any((folder / ".git").exists() for folder in (package_dir, *package_dir.parents)):
        return "git refuses the repository around the package; `git status` there says why"
    return "not in a git repository"


def _diff(git: Git, package_dir: Path, against: str, top: str) -> _Change:
    """The change of the whole working tree against a commit or tree, without files that may hold a secret.

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
            words = ["git", "-C", top, "diff", "--name-status", "--no-renames", "-z", against, "--"]
            listed = os.fsdecode(git.execute(words, env=environment, stdout_as_string=False))
            status = _status_by_name(listed)
            secret = tuple(name for name, letter in status.items() if _may_hold_secret(name, letter))
            words = ["git", "-C", top, *_DIFF, against, "--", *(f":(top,exclude,literal){name}" for name in secret)]
            git.execute(words, env=environment, output_stream=cast(BinaryIO, patch))
        except CommandError:
            return _Change()
    return _Change(patch=patch, status=status, secret=secret)


def _status_by_name(listed: str) -> dict[str, str]:
    words = listed.split("\0")
    return dict(zip(words[1::2], words[0::2], strict=False))  # a letter, a name, and so on


def _may_hold_secret(name: str, letter: str) -> bool:
    """Code that was committed already hides nothing, whatever it is called."""
    return is_secret_file(name.rpartition("/")[2]) and (letter == "A" or not name.endswith(".py"))


def _unheld(
    git: Git, package_dir: Path, package: str, against: str | None, change: _Change
) -> tuple[set[str], list[str]]:
    """Code that neither commit nor patch holds as it lies on the disk; code of the commit that is not on the disk.

    As paths in the repository. Of the second git knows nothing (a sparse checkout): what is deleted is in the patch.
    """
    printed = _ask(git, "ls-tree", "-r", "-z", "--full-tree", against, "--", package or ".") if against else None
    start = f"{package}/" if package else ""
    tree = {name.removeprefix(start): entry for name, entry in parse_tree(printed or "").items()}
    changed = [name.removeprefix(start) for name in change.status if name not in change.secret]
    unheld = not_as_held(package_dir, tree, changed, change.content())
    there = set(python_files(package_dir))
    absent = [
        start + name
        for name in tree
        if name.endswith(".py") and name not in there and start + name not in change.status
    ]
    return {start + name for name in unheld}, absent


def _untracked_names(git: Git, top: Path, leave_out: Collection[Path]) -> list[str]:
    """Untracked, not ignored files."""
    printed = _ask(git, "-C", str(top), "ls-files", "-z", "--others", "--exclude-standard") or ""
    hidden = [f"{folder.resolve()}/" for folder in leave_out]
    return [name for name in printed.split("\0") if name and not f"{top}/{name}".startswith(tuple(hidden))]


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


def _notes_on_files(change: _Change, absent: Sequence[str], not_kept: Sequence[str]) -> list[str]:
    said = {
        "not in the patch, by its name it may hold a secret": change.secret,
        "in the commit and not on the disk, which no patch tells": absent,
        "code that could not be kept": not_kept,
    }
    return [f"{text}: {_some(names)}" for text, names in said.items() if names]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _describe(code: _Code) -> dict[str, Json]:
    patch: Json = None
    if code.patch:
        digest = hashlib.sha256(code.patch).hexdigest()
        patch = {"file": "code.patch", "bytes": len(code.patch), "sha256": digest}
    record: dict[str, Json] = asdict(code.record)
    return {
        "format": 1,
        **record,
        "package": code.package,
        "patch": patch,
        "untracked": code.untracked.as_json(),
    }


def _newest(into: Path) -> Mapping[str, Json] | None:
    """The newest description below `into`; None for none, and an empty one for one that cannot be read."""
    folder = code_folder(into)
    if folder is None:
        return None
    try:
        described = read_json_bounded(folder / "git.json")
    except DamagedFileError:
        return {}
    return described if isinstance(described, dict) else {}


def code_folder(into: Path, attempt: int | None = None) -> Path | None:
    """Where below a run's `code/` folder the code of an attempt is described, or of the newest; None where nowhere."""
    found = {int(path.parent.name): path.parent for path in into.glob("attempts/[0-9][0-9][0-9]*/git.json")
             if path.parent.name.isdecimal()}  # fmt: skip
    found |= {1: into} if (into / "git.json").exists() else {}
    numbers = [number for number in found if attempt is None or number <= attempt]
    return found[max(numbers)] if numbers else None


def _write(code: _Code, described: Mapping[str, Json], folder: Path, sign: Callable[[bytes], str | None]) -> None:
    """Bytes first, the description last: `git.json` names only what is there."""
    make_dirs(folder)
    if code.patch:
        write_atomic(folder / "code.patch", code.patch)
    if code.untracked.archive is not None:
        write_atomic(folder / "untracked.tar.gz", code.untracked.archive)
    text = pretty(described)
    signature = sign(text.encode())
    if signature is not None:
        write_atomic(folder / SIGNATURE, signature + "\n")
    write_atomic(folder / "git.json", text)
