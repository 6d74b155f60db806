"""Exports onto the disk: whole or not at all, and never over anything that is not itself an export."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from dino_exp.errors import RefusedError, UsageError
from dino_exp.fsio import LOCAL, Files, make_dirs, write_atomic
from dino_exp.weights.formats import HUB_FILES, SUFFIXES, Format


def check_target(path: Path, form: Format, *, force: bool) -> None:
    """Whether an export of this format may go there.

    Raises UsageError for a name that belongs to another format, RefusedError for what is there already: `force` lets
    a file be replaced, and a folder that holds nothing but an export, and is not where the command runs.
    """
    _check_name(path, form)
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise RefusedError(f"{path}: is there already, and nothing is overwritten; choose another --to, or add --force")
    if form != "hf":
        if path.is_dir():
            raise RefusedError(f"{path}: is a folder; --force replaces files. Choose another --to")
        return
    if path.is_symlink() or not path.is_dir():
        raise RefusedError(f"{path}: is no folder; --force replaces a folder by a folder. Choose another --to")
    if Path.cwd().is_relative_to(path.resolve()):
        raise RefusedError(
            f"{path}: is the current directory, or one that holds it; --force does not replace it. Choose another --to"
        )
    others = [name for name in LOCAL.listdir(path) if name not in HUB_FILES]
    if others:
        raise RefusedError(
            f"{path}: holds {others[0]!r} beside an export ({len(others)} such); --force replaces exports only. Choose "
            "another --to"
        )


def _check_name(path: Path, form: Format) -> None:
    wanted = SUFFIXES[form]
    if wanted and path.suffix not in wanted:
        other = next((name for name, suffixes in SUFFIXES.items() if path.suffix in suffixes), None)
        hint = f", or --format {other}" if other else ""
        raise UsageError(f"--to {path}: expected a name with {wanted[0]} for --format {form}{hint}")
    others = [name for name, suffixes in SUFFIXES.items() if path.suffix in suffixes]
    if not wanted and others:
        raise UsageError(f"--to {path}: --format {form} makes a folder; give one, or --format {others[0]}")


def place_file(path: Path, data: bytes, *, force: bool, form: Format, files: Files = LOCAL) -> None:
    """Write one file durably. Raises as `check_target`, once more at the last moment, and OSError."""
    make_dirs(path.absolute().parent, files)
    check_target(path, form, force=force)
    write_atomic(path, data, files)


def place_folder(path: Path, content: Mapping[str, bytes], *, force: bool, files: Files = LOCAL) -> None:
    """Write a folder durably: beside its place first, then renamed. `content`: names out of `HUB_FILES`.

    An older export is moved aside before and removed after; a process that dies between the two leaves both, and the
    next one tidies up. Raises as `check_target`, and OSError.
    """
    path = path.absolute()
    make_dirs(path.parent, files)
    temporary, aside = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    remove_export(temporary, files)
    files.mkdir(temporary)
    try:
        for name, data in content.items():
            with files.create(temporary / name) as handle:
                handle.write(data)
                handle.sync()
        files.sync_dir(temporary)
        check_target(path, "hf", force=force)
        remove_export(aside, files)
        if path.is_dir():
            files.replace(path, aside)
        files.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            remove_export(temporary, files)
        raise
    files.sync_dir(path.parent)
    remove_export(aside, files)


def remove_export(folder: Path, files: Files = LOCAL) -> None:
    """Remove the files of an export and their folder, where there is one. Raises OSError where it holds others."""
    for name in files.listdir(folder):
        if name in HUB_FILES:
            files.unlink(folder / name)
    with contextlib.suppress(FileNotFoundError):
        files.rmdir(folder)
