"""How the recorded code of one run differs from that of another, as patches for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino_exp.errors import DinoExpError
from dino_exp.fsio import LOCAL, read_json_bounded
from dino_exp.runs.code_archive import MAX_PATCH_BYTES
from dino_exp.runs.code_identity import PACKAGE_DIR, ask_git

_NUMBER = re.compile(r"[0-9]{3,9}")
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")  # a record may be a stranger's: nothing else goes to git


def code_difference(one: Path, other: Path) -> str:
    """The `code/` folders of two runs compared: what the commits changed, then what each had not committed.

    First for the code that both began with, then for each other code that one of them went on with. Says so where the
    code is the same, and where the repository around this package does not know a commit. Runs only git, which only
    reads. Raises DinoExpError where a record is gone, DamagedFileError, OSError.
    """
    parts = list(_parts(one, other, one.parent.name, other.parent.name))
    for folder in (one, other):
        before, name = folder, folder.parent.name
        for later in _of_later_attempts(folder):
            number = int(later.name)
            parts += [
                "",
                f"# {name} from attempt {number} on:",
                *_parts(before, later, f"{name} before", f"{name} then"),
            ]
            before = later
    return "\n".join(parts)


def _of_later_attempts(folder: Path) -> list[Path]:
    """Where other code than before lies: a later attempt with the same code leaves nothing."""
    found = [path.parent for path in folder.glob("attempts/*/git.json") if _NUMBER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name))


def _parts(one: Path, other: Path, one_name: str, other_name: str) -> Iterator[str]:
    a, b = _described(one), _described(other)
    if a.get("id") == b.get("id") is not None:
        yield f"the same code: {a['id']}"
        return
    commits = [a.get("commit"), b.get("commit")]
    if commits[0] == commits[1]:
        yield f"# both at commit {commits[0] or '– (none)'}"
    else:
        yield f"# from commit {commits[0]} to {commits[1]}"
        yield _between(*commits)
    for folder, described, name in ((one, a, one_name), (other, b, other_name)):
        yield f"# {name}: not committed"
        yield _patch(folder) or "(nothing)"
        files = [str(file.get("path")) for file in _files(described)]
        if files:
            yield f"# {name}: not tracked, in {folder / 'untracked.tar.gz'}: {', '.join(files)}"


def _between(a: object, b: object) -> str:
    for commit in (a, b):
        known = isinstance(commit, str) and _COMMIT.fullmatch(commit)
        if not known or ask_git(PACKAGE_DIR, "cat-file", "-e", f"{commit}^{{commit}}") is None:
            return f"(the repository of this package does not know commit {str(commit)[:64]})"
    words = ("--no-color", "--no-ext-diff", "--no-textconv", str(a), str(b), "--", ".")
    return ask_git(PACKAGE_DIR, "diff", *words) or "(no change in the package)"


def _described(folder: Path) -> dict[str, Any]:
    try:
        found = read_json_bounded(folder / "git.json")
    except FileNotFoundError as gone:
        raise DinoExpError(f"{folder / 'git.json'}: it is gone, so nobody knows what code this run had") from gone
    return found if isinstance(found, dict) else {}


def _patch(folder: Path) -> str:
    try:
        return LOCAL.read_bytes(folder / "code.patch", MAX_PATCH_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _files(described: dict[str, Any]) -> list[dict[str, Any]]:
    untracked = described.get("untracked")
    files = untracked.get("files") if isinstance(untracked, dict) else None
    return [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
