"""Repositories of a small package, made by git that knows nothing of the user's settings."""

import os
import subprocess
from pathlib import Path

import pytest


def clean_git(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "protocol.file.allow=always", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def make_package(root: Path, package: str = "pkg") -> None:
    (root / package / "sub").mkdir(parents=True)
    (root / package / "__init__.py").write_text("x = 1\n")
    (root / package / "sub" / "a.py").write_text("y = 2\n")
    (root / "README").write_text("hello\n")


def make_repository(root: Path, package: str = "pkg") -> Path:
    """A repository with one commit of a package and a README."""
    make_package(root, package)
    git(root, "init", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    return root
