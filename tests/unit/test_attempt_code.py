"""What an attempt records of its code: nothing that runs write, and signed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from code_samples import clean_git, git, make_repository
from config_examples import config

from dino_exp.attempts import attempt
from dino_exp.attempts.attempt import Attempt, Command
from dino_exp.attempts.target import Target
from dino_exp.config.canonical import config_hash
from dino_exp.fsio import read_json_bounded
from dino_exp.runs.code_identity import code_id
from dino_exp.runs.key import RunKey
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.signature import NAME, is_signed, own_key


def test_outputs_and_cache_in_the_repository_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_git(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = make_repository(tmp_path / "project")
    monkeypatch.setattr(attempt, "PACKAGE_DIR", root / "pkg")
    for name in ("out/catalogue.sqlite", "out/sweeps/a/sweep.json", "images/x.bin", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    settings = config(f"paths.outputs={root}/out", f"paths.cache={root}/images")
    key = RunKey(model=settings.model.name, config_hash=config_hash(settings), code_id=code_id(root / "pkg"))
    paths = RunPaths(root / "out" / "runs" / key.text())
    target = Target(paths=paths, key=key, config=settings, record=None, changes=())
    unused = cast(Any, None)
    made = Attempt(target, Command(overrides=[], composed={}), unused, unused, unused)
    record = made.write_settings()
    described = read_json_bounded(paths.code_dir / "git.json")
    assert [file["path"] for file in described["untracked"]["files"]] == ["notes.txt"]
    assert record.commit == git(root, "rev-parse", "HEAD")
    own = own_key({"XDG_STATE_HOME": str(tmp_path / "state")})
    assert is_signed(own, key.text(), (paths.code_dir / "git.json").read_bytes(), paths.code_dir / NAME)
