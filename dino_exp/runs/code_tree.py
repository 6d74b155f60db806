"""Which Python files of a package are not as its commit has them, whatever git was told to overlook or to convert.

git itself does not tell of files that it ignores or assumes to be unchanged, and converts the ends of lines.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_LINK = "120000"
_HASHES = {40: hashlib.sha1, 64: hashlib.sha256}  # by the number of digits of a name
_PATCHED = re.compile(rb"^index [0-9a-f]+\.\.([0-9a-f]+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class TreeEntry:
    """A file of a commit: whether it is a link, and the name of its content."""

    is_link: bool
    blob: str


def python_files(package_dir: Path) -> list[str]:
    """The `*.py` files below a folder, as POSIX paths, sorted: the code of a package. Links to files count as files."""
    paths = [path.relative_to(package_dir) for path in package_dir.rglob("*.py") if path.is_file()]
    return sorted(path.as_posix() for path in paths if "__pycache__" not in path.parts)


def parse_tree(printed: str) -> dict[str, TreeEntry]:
    """The files that `git ls-tree -r -z` prints, by path."""
    found = {}
    for line in filter(None, printed.split("\0")):
        described, _, name = line.partition("\t")
        mode, _, blob = described.split(" ")
        found[name] = TreeEntry(is_link=mode == _LINK, blob=blob)
    return found


def not_as_held(package_dir: Path, tree: Mapping[str, TreeEntry], changed: Collection[str], patch: bytes) -> list[str]:
    """The files of the package, by path in it, that neither the commit nor the patch holds as they lie on the disk.

    `tree`: what the commit has in the package. `changed`: which files the patch is about, and `patch`: that of `git
    diff --full-index`. Raises OSError.
    """
    patched = {found.decode() for found in _PATCHED.findall(patch)}
    num_digits = max(map(len, (*patched, *(entry.blob for entry in tree.values()))), default=40)

    def is_held(name: str) -> bool:
        path, entry = package_dir / name, tree.get(name)
        if path.is_symlink():  # as a link it may lead anywhere: only one that was committed counts
            blob = blob_name(os.fsencode(path.readlink()), num_digits)
            return entry is not None and entry.is_link and entry.blob == blob
        blob = blob_name(path.read_bytes(), num_digits)
        is_committed = entry is not None and not entry.is_link and entry.blob == blob
        return is_committed or (name in changed and blob in patched)

    return [name for name in python_files(package_dir) if not is_held(name)]


def blob_name(content: bytes, num_digits: int) -> str:
    """The name that git gives a file of this content, in a repository whose names have so many digits."""
    return _HASHES[num_digits](b"blob %d\0" % len(content) + content).hexdigest()
