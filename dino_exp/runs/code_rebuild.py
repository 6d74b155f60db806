"""The recorded code of a run as files again: its commit, its patch, its untracked files, checked against `code_id`.

Nothing that the record does not name and vouch for by its digest is used.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dino_exp.errors import RefusedError
from dino_exp.fsio import LOCAL, DamagedFileError, parse_json
from dino_exp.runs.code_archive import MAX_PATCH_BYTES
from dino_exp.runs.code_identity import PACKAGE_DIR, ask_git, code_folder, code_id
from dino_exp.runs.jsontext import Json
from dino_exp.runs.record import CodeRef
from dino_exp.runs.shape import WrongShapeError, anything, list_of, map_of, optional, text
from dino_exp.runs.signature import NAME as SIGNATURE
from dino_exp.runs.signature import is_signed

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MAX_BYTES = 16 << 20
_MAX_TAR_BYTES = 64 << 20  # what is archived, and the headers of very many files
_TIMEOUT_SECS = 600
# Nothing of the user's repository is to run: no hook, no prompt, no helper of a remote. Nor is anything converted.
_QUIET = (
    *("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "protocol.allow=never"),
    *("-c", "core.autocrlf=false", "-c", "advice.detachedHead=false"),
)


@dataclass(frozen=True, kw_only=True)
class RecordedCode:
    """What a `git.json` says, checked. `package` is the package's path in the repository; digests are SHA-256.

    `files`: the digests of what is in the archive. `described`: the text of `git.json` itself.
    """

    folder: Path
    id: str
    commit: str | None
    package: str | None
    patch: str | None
    archive: str | None
    files: Mapping[str, str]
    described: bytes

    def describe(self) -> list[tuple[str, str]]:
        """What would be run, for whoever has to trust it."""
        patch = self.folder / "code.patch"
        files = f"{self.folder / 'untracked.tar.gz'}: {', '.join(self.files)}" if self.files else "–"
        return [
            ("commit", self.commit or "– (none)"),
            ("patch", f"{patch} ({LOCAL.size(patch) or 0:,} bytes)" if self.patch else "–"),
            ("files", files),
            ("code", self.id),
        ]

    def is_signed(self, key: bytes | None, run_key: str) -> bool:
        """Whether this user's key has signed it, for this run."""
        return is_signed(key, run_key, self.described, self.folder / SIGNATURE)


def recorded_code(folder: Path, attempt: int, expected: CodeRef) -> RecordedCode:
    """The code of one attempt, from the run's `code/` folder; `expected` is what `run.json` says of it.

    Raises DamagedFileError, FileNotFoundError; RefusedError where the two do not agree.
    """
    path = (code_folder(folder, attempt) or folder) / "git.json"
    described = LOCAL.read_bytes(path, _MAX_BYTES)
    try:
        members = map_of(anything)(parse_json(described, str(path)))
        commit, package = optional(text)(members.get("commit")), optional(text)(members.get("package"))
        untracked = map_of(anything)(members.get("untracked"))
        listed = [map_of(anything)(file) for file in list_of(anything)(untracked.get("files"))]
        files = {text(file.get("path")): text(file.get("sha256")) for file in listed}
        identity, archive = text(members.get("id")), optional(text)(untracked.get("sha256"))
        patch = optional(_digest_of)(members.get("patch"))
    except WrongShapeError as error:
        raise DamagedFileError(f"{path}: {error}") from error
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise DamagedFileError(f"{path}: commit is {commit[:80]!r}, expected 40 or 64 hex digits")
    for what, place in [("package", package), *(("a file", name) for name in files)]:
        if place is not None and not (_is_inside(place) or (place == "" and what == "package")):
            raise DamagedFileError(f"{path}: {what} is {place[:80]!r}, expected a path inside the repository")
    if (identity, commit) != (expected.id, expected.commit):
        raise RefusedError(
            f"{path}: describes the code {identity[:80]} of commit {commit}, and run.json says that attempt {attempt} "
            f"ran {expected.id} of commit {expected.commit}; one of the two is not of this run"
        )
    return RecordedCode(
        folder=path.parent, id=identity, commit=commit, package=package, patch=patch, archive=archive, files=files,
        described=described,
    )  # fmt: skip


def _digest_of(described: Json) -> str:
    return text(map_of(anything)(described).get("sha256"))


def _is_inside(name: str) -> bool:
    """Whether this is a path of a repository's file: relative, leading nowhere else, and nothing of git's own."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\0" not in name and not {"..", ".git"} & {
        part.lower() for part in parts
    }  # fmt: skip


def rebuild_code(code: RecordedCode, into: Path) -> Path:
    """Make the files anew below `into`, from the repository around this package; the folder to import from.

    The user's repository, its index and its worktree do not change. Where this program is that code already, it is
    used as it is. Raises RefusedError where the code cannot be had or comes out as other code, DamagedFileError where
    patch or archive are not what was recorded.
    """
    if code_id(PACKAGE_DIR) == code.id:
        return PACKAGE_DIR.parent
    if code.package is None:
        raise RefusedError(
            f"{code.folder}: the code was not in a git repository (git.json says why); it can only be reproduced by an "
            f"installation whose code_id is {code.id}"
        )
    into = into if code.package else into / PACKAGE_DIR.name  # the repository is the package: it needs its name
    into.mkdir(parents=True)
    sha256 = ("--object-format=sha256",) if code.commit is not None and len(code.commit) == 64 else ()
    _git("init", "--quiet", "--template=", *sha256, str(into))
    if code.commit is not None:
        _check_out(code, code.commit, into)
    if code.patch is not None:
        patch = _as_recorded(code.folder / "code.patch", MAX_PATCH_BYTES, code.patch)
        _git("-C", str(into), "apply", "--whitespace=nowarn", "-", given=patch)
    if code.files:
        _unpack(code, into)
    package = into / code.package
    found = code_id(package) if package.is_dir() else "none"
    if found != code.id:
        raise RefusedError(
            f"{code.folder}: commit, patch and files make the code {found}, the run had {code.id}; a patch or a file "
            "that was not kept is missing (`note` and `left_out` in git.json)"
        )
    return package.parent


def _check_out(code: RecordedCode, commit: str, into: Path) -> None:
    """The commit's files, out of the objects of the repository around this package, which are borrowed.

    Not by a clone: that copies what is reachable of a shallow repository, and a commit need not be.
    """
    top = ask_git(PACKAGE_DIR, "rev-parse", "--show-toplevel")
    objects = ask_git(PACKAGE_DIR, "rev-parse", "--git-path", "objects")
    if top is None or objects is None:
        raise RefusedError(
            f"{code.folder}: the code is commit {commit} of a git repository, and this program lies in none; run "
            "`python -m dino_exp runs reproduce` from a clone of it"
        )
    if ask_git(PACKAGE_DIR, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise RefusedError(f"{top} does not know commit {commit}; fetch it there: `git -C {top} fetch --all`")
    lent = into / ".git" / "objects" / "info" / "alternates"
    lent.parent.mkdir(parents=True, exist_ok=True)
    lent.write_bytes(os.fsencode((PACKAGE_DIR / objects).resolve()) + b"\n")
    shallow = ask_git(PACKAGE_DIR, "rev-parse", "--git-path", "shallow")
    if shallow is not None and (PACKAGE_DIR / shallow).exists():
        (into / ".git" / "shallow").write_bytes((PACKAGE_DIR / shallow).read_bytes())
    _git("-C", str(into), "checkout", "--quiet", "--detach", commit)


def _as_recorded(path: Path, max_bytes: int, digest: str) -> bytes:
    """The bytes of a file whose digest is recorded. Raises DamagedFileError for others."""
    content = LOCAL.read_bytes(path, max_bytes)
    if hashlib.sha256(content).hexdigest() != digest:
        raise DamagedFileError(f"{path}: is not what was recorded: git.json beside it gives it another digest")
    return content


def _unpack(code: RecordedCode, into: Path) -> None:
    """Exactly the files that are recorded; a damaged or doctored archive is refused before anything is written."""
    path = code.folder / "untracked.tar.gz"
    content = _as_recorded(path, _MAX_TAR_BYTES, code.archive or "")
    try:
        found = dict(_members(content))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as problem:
        raise DamagedFileError(f"{path}: cannot be unpacked: {problem}") from problem
    digests = {name: hashlib.sha256(data).hexdigest() for name, (data, _) in found.items()}
    if digests != dict(code.files):
        odd = sorted({*digests.items()} ^ {*code.files.items()})[0][0]
        raise DamagedFileError(f"{path}: {odd[:200]!r} is not as git.json beside it lists it; nothing was unpacked")
    for name, (data, mode) in found.items():
        place = into / name
        if not place.parent.resolve().is_relative_to(into.resolve()):
            raise RefusedError(f"{path}: {name[:200]!r} lies behind a link that leads out of the repository")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # a link in its place is not followed
        place.write_bytes(data)
        place.chmod(mode & 0o755 | 0o600)


def _members(archive: bytes) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Name, bytes and mode of each file of an archive. Raises ValueError for anything else in it, and for too much."""
    with gzip.GzipFile(fileobj=io.BytesIO(archive)) as zipped:
        plain = zipped.read(_MAX_TAR_BYTES + 1)
    if len(plain) > _MAX_TAR_BYTES:
        raise ValueError(f"more than {_MAX_TAR_BYTES} bytes")
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                raise ValueError(f"{member.name[:200]!r} is no regular file")
            yield member.name, (file.read(), member.mode)


def _git(*words: str, given: bytes | None = None) -> None:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1"}
    done = subprocess.run(
        ["git", *_QUIET, *words], env=environment, check=False, capture_output=True, input=given, timeout=_TIMEOUT_SECS
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[:500]
        raise RefusedError(f"git {words[0] if words[0] != '-C' else words[2]}: {said}")
