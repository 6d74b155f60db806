import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from code_samples import clean_git, git, make_package, make_repository

from dino_exp.runs import code_archive, code_identity
from dino_exp.runs.code_identity import code_id, record_code


@pytest.fixture(autouse=True)
def _clean_git(monkeypatch):
    clean_git(monkeypatch)


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / "project")


def record(root, tmp_path, **options):
    found = record_code(root / "pkg", tmp_path / "run" / "code", **options)
    return found, json.loads((tmp_path / "run" / "code" / "git.json").read_text())


def test_the_identity_is_of_python_files_only(tmp_path):
    make_package(tmp_path)
    package = tmp_path / "pkg"
    before = code_id(package)
    (package / "data.yaml").write_text("a: 1")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.py").write_text("z")
    assert code_id(package) == before
    for change in (
        lambda: (package / "new.py").write_text(""),
        lambda: (package / "new.py").rename(package / "sub" / "new.py"),
        lambda: (package / "sub" / "a.py").write_text("y = 3\n"),
    ):
        last = code_id(package)
        change()
        assert code_id(package) != last


def test_the_identity_is_the_documented_hash(tmp_path):
    make_package(tmp_path)
    lines = [f"{name}\0{hashlib.sha256(text).hexdigest()}\n" for name, text in
             [("__init__.py", b"x = 1\n"), ("sub/a.py", b"y = 2\n")]]  # fmt: skip
    assert code_id(tmp_path / "pkg") == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_identity_is_the_same_clean_dirty_and_installed(repo, tmp_path):
    shutil.copytree(repo / "pkg", tmp_path / "site-packages" / "pkg")
    assert code_id(repo / "pkg") == code_id(tmp_path / "site-packages" / "pkg")
    with pytest.raises(FileNotFoundError, match="expected a Python package"):
        code_id(tmp_path / "nowhere")


def test_a_clean_commit(repo, tmp_path):
    found, written = record(repo, tmp_path)
    assert (found.commit, found.branch, found.dirty) == (git(repo, "rev-parse", "HEAD"), "main", False)
    assert (found.note, found.remote, found.id) == ("", None, code_id(repo / "pkg"))
    assert written["package"] == "pkg"
    assert [path.name for path in (tmp_path / "run" / "code").iterdir()] == ["git.json"]


def test_patch_and_untracked_files_rebuild_the_working_tree(repo, tmp_path):
    (repo / "pkg" / "__init__.py").write_text("x = 5\n")
    (repo / "pkg" / "sub" / "a.py").unlink()
    (repo / "staged.bin").write_bytes(bytes(range(256)))
    git(repo, "add", "staged.bin")
    (repo / "pkg" / "new ü.py").write_text("new\n")
    (repo / "run.sh").write_text("#!/bin/sh\n")
    (repo / "run.sh").chmod(0o755)
    for setting in ("diff.noprefix=true", "color.ui=always", "diff.external=false", "core.quotePath=true"):
        git(repo, "config", *setting.split("="))
    found, written = record(repo, tmp_path)
    assert found.dirty is True
    assert [entry["path"] for entry in written["untracked"]["files"]] == ["pkg/new ü.py", "run.sh"]

    again, code = tmp_path / "again", tmp_path / "run" / "code"
    git(tmp_path, "clone", str(repo), str(again))
    git(again, "checkout", found.commit)
    git(again, "apply", str(code / "code.patch"))
    with tarfile.open(code / "untracked.tar.gz") as tar:
        tar.extractall(again, filter="data")
    assert code_id(again / "pkg") == found.id
    assert (again / "staged.bin").read_bytes() == bytes(range(256))
    assert (again / "run.sh").stat().st_mode & 0o111


def test_the_users_repository_is_not_touched(repo, tmp_path):
    (repo / "README").write_text("hello\n")  # same content, other times: a refresh would rewrite the index
    os.utime(repo / "README", (1, 1))
    (repo / "pkg" / "new.py").write_text("new\n")
    (repo / "pkg" / "__init__.py").write_text("x = 7\n")

    def everything():
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in repo.rglob("*")
        }

    before = everything()
    record(repo, tmp_path)
    assert everything() == before
    patch = (tmp_path / "run" / "code" / "code.patch").read_text()
    assert "x = 7" in patch
    assert "README" not in patch


def test_an_untracked_file_outside_the_package_is_kept_and_not_dirty(repo, tmp_path):
    (repo / "notes.txt").write_text("n")
    found, written = record(repo, tmp_path)
    assert found.dirty is False
    assert written["untracked"]["files"][0]["path"] == "notes.txt"


def test_the_archive_is_bounded_deterministic_and_without_secrets(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(code_archive, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(code_archive, "MAX_ARCHIVE_BYTES", 150)
    (repo / "pkg" / "b.py").write_text("b" * 90)
    (repo / "a.txt").write_text("a" * 90)
    (repo / "big.bin").write_bytes(b"x" * 101)
    (repo / "c.txt").write_text("c" * 50)
    (repo / ".env").write_text("TOKEN=hunter2")
    (repo / "my_credentials.json").write_text("hunter2")
    (repo / "link").symlink_to("/etc/passwd")
    _, written = record(repo, tmp_path)
    untracked = written["untracked"]
    assert [entry["path"] for entry in untracked["files"]] == ["c.txt", "pkg/b.py"]  # the package first
    reasons = {entry["path"]: entry["reason"] for entry in untracked["left_out"]}
    assert set(reasons) == {"a.txt", "big.bin", ".env", "my_credentials.json", "link"}
    assert "full" in reasons["a.txt"]
    assert "101 bytes" in reasons["big.bin"]
    assert "secret" in reasons[".env"]
    assert reasons["link"] == "not a regular file"
    archive = (tmp_path / "run" / "code" / "untracked.tar.gz").read_bytes()
    os.utime(repo / "c.txt", (1, 1))
    record_code(repo / "pkg", tmp_path / "other" / "code")
    assert (tmp_path / "other" / "code" / "untracked.tar.gz").read_bytes() == archive
    assert hashlib.sha256(archive).hexdigest() == untracked["sha256"]


def test_how_many_files_are_looked_at_and_how_many_bytes_are_read_is_bounded(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(code_archive, "MAX_FILES", 4)
    monkeypatch.setattr(code_archive, "MAX_ARCHIVE_BYTES", 60)
    monkeypatch.setattr(code_archive, "MAX_NAME_BYTES", 40)
    for name in "abcdef":
        (repo / f"{name}.txt").write_text(name * 50)
    (repo / ("z" * 41)).touch()
    (repo / "pkg" / "z.py").write_text("z")
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **b: opened.append(path.name) or real(path, *a, **b))
    _, written = record(repo, tmp_path)
    assert [entry["path"] for entry in written["untracked"]["files"]] == ["a.txt", "pkg/z.py"]
    assert [name for name in opened if name.endswith(".txt")] == ["a.txt"]  # the others are too many, or too large
    reasons = {entry["path"]: entry["reason"] for entry in written["untracked"]["left_out"]}
    assert "full" in reasons["c.txt"]
    assert all("too many files; at most 4" in reasons[name] for name in ("d.txt", "f.txt", "z" * 41))


def test_a_file_that_vanishes_meanwhile_is_kept_or_left_out(repo, tmp_path, monkeypatch):
    (repo / "a.txt").write_text("1")
    (repo / "b.txt").write_text("1")
    real_tar, real_open = code_archive._tar, Path.open

    def opened(path, *a, **b):
        if path.name == "b.txt":
            path.unlink()  # after it was found small enough
        return real_open(path, *a, **b)

    def packed(contents):
        (repo / "a.txt").unlink()  # after it was read
        return real_tar(contents)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(code_archive, "_tar", packed)
    _, written = record(repo, tmp_path)
    assert [entry["path"] for entry in written["untracked"]["files"]] == ["a.txt"]
    assert [entry["path"] for entry in written["untracked"]["left_out"]] == ["b.txt"]


def test_what_may_hold_a_secret_is_left_out_of_the_patch_too(repo, tmp_path):
    (repo / "pkg" / "tokens.py").write_text("a = 1\n")
    (repo / "settings.env").write_text("PLACE=here\n")
    git(repo, "add", ".")
    git(repo, "commit", "-m", "second")
    (repo / "pkg" / "tokens.py").write_text("a = 2\n")
    (repo / "settings.env").write_text("PLACE=here\nTOKEN=hunter2\n")
    (repo / "pkg" / ".env").write_text("TOKEN=hunter2\n")
    git(repo, "add", "pkg/.env")
    found, written = record(repo, tmp_path)
    patch = (tmp_path / "run" / "code" / "code.patch").read_text()
    assert "hunter2" not in patch
    assert "+a = 2" in patch  # code of the commit, whatever it is called
    assert "not in the patch, by its name it may hold a secret: pkg/.env, settings.env" in found.note
    assert written["untracked"]["files"] == []
    git(repo, "reset", "--hard")
    (repo / "settings.env").write_text("TOKEN=hunter2\n")
    found = record_code(repo / "pkg", tmp_path / "other")
    assert (found.dirty, (tmp_path / "other" / "code.patch").exists()) == (True, False)


def test_a_patch_beyond_the_cap_is_left_out_and_said(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(code_identity, "MAX_PATCH_BYTES", 100)
    (repo / "README").write_text("long\n" * 1000)
    found, written = record(repo, tmp_path)
    assert found.dirty is True
    assert "at most 100 are kept" in found.note
    assert written["patch"] is None
    assert not (tmp_path / "run" / "code" / "code.patch").exists()


def test_outputs_in_the_repository_are_left_out(repo, tmp_path):
    (repo / "outputs" / "runs").mkdir(parents=True)
    (repo / "outputs" / "runs" / "x").write_text("x")
    (repo / "pkg" / "new.py").write_text("1")
    _, written = record(repo, tmp_path, leave_out=[repo / "outputs", repo, tmp_path / "elsewhere"])
    assert [entry["path"] for entry in written["untracked"]["files"]] == ["pkg/new.py"]  # a folder around the package


def test_later_attempts_are_written_only_when_something_changed(repo, tmp_path):
    code = tmp_path / "run" / "code"
    first, _ = record(repo, tmp_path)
    record_code(repo / "pkg", code, attempt=2)
    assert not (code / "attempts").exists()
    (repo / "pkg" / "__init__.py").write_text("x = 9  # of another length, whatever the clock says\n")
    third = record_code(repo / "pkg", code, attempt=3)
    record_code(repo / "pkg", code, attempt=4)
    assert [path.name for path in (code / "attempts").iterdir()] == ["003"]
    assert json.loads((code / "git.json").read_text())["id"] == first.id
    assert json.loads((code / "attempts" / "003" / "git.json").read_text())["id"] == third.id
    assert (code / "attempts" / "003" / "code.patch").exists()


def test_a_damaged_description_is_written_anew_and_not_over(repo, tmp_path):
    code = tmp_path / "run" / "code"
    record(repo, tmp_path)
    (code / "git.json").write_text("{")
    record_code(repo / "pkg", code, attempt=2)
    assert (code / "git.json").read_text() == "{"
    assert json.loads((code / "attempts" / "002" / "git.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("address", "clean"),
    [("https://me:hunter2@host/x.git", "https://host/x.git"), ("git@host:me/x.git", "git@host:me/x.git")],
)
def test_the_remote_is_told_without_credentials(repo, tmp_path, address, clean):
    git(repo, "remote", "add", "upstream", "https://elsewhere/x")
    git(repo, "remote", "add", "origin", address)
    git(repo, "config", "url.https://me:hunter2@host/.insteadOf", "git@host:")
    found, _ = record(repo, tmp_path)
    assert found.remote == clean
    assert "hunter2" not in (tmp_path / "run" / "code" / "git.json").read_text()


def test_detached_head(repo, tmp_path):
    git(repo, "checkout", "--detach")
    found, _ = record(repo, tmp_path)
    assert (found.branch, found.note, found.dirty) == (None, "detached HEAD", False)


def test_linked_worktree(repo, tmp_path):
    git(repo, "worktree", "add", str(tmp_path / "tree"), "-b", "side")
    found, _ = record(tmp_path / "tree", tmp_path)
    assert (found.branch, found.note, found.commit) == (
        "side",
        "linked worktree",
        git(repo, "rev-parse", "HEAD"),
    )


def test_submodule(repo, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--initial-branch=main")
    git(outer, "submodule", "add", str(repo), "inner")
    found, _ = record(outer / "inner", tmp_path)
    assert found.commit == git(repo, "rev-parse", "HEAD")
    assert found.note == "submodule"
    assert found.remote == str(repo)


def test_no_commit_yet(tmp_path):
    root = tmp_path / "project"
    make_package(root)
    git(root, "init", "--initial-branch=main")
    git(root, "add", "pkg")
    found, written = record(root, tmp_path)
    assert (found.commit, found.branch, found.dirty, found.note) == (None, "main", True, "no commit yet")
    assert [entry["path"] for entry in written["untracked"]["files"]] == ["README"]
    again = tmp_path / "again"
    again.mkdir()
    git(again, "init")
    git(again, "apply", str(tmp_path / "run" / "code" / "code.patch"))
    assert code_id(again / "pkg") == found.id


def test_an_installed_package_is_not_in_the_repository_around_it(repo, tmp_path):
    (repo / ".gitignore").write_text(".venv/\n")
    shutil.copytree(repo / "pkg", repo / ".venv" / "site-packages" / "pkg")
    found = record_code(repo / ".venv" / "site-packages" / "pkg", tmp_path / "code")
    assert (found.commit, found.dirty) == (None, None)
    assert found.note == "the package is not tracked by the repository around it"
    assert found.id == code_id(repo / "pkg")


def test_no_repository(tmp_path):
    make_package(tmp_path)
    found, written = record(tmp_path, tmp_path)
    assert (found.commit, found.note) == (None, "not in a git repository")
    assert written["id"] == found.id


def test_a_repository_that_git_refuses(repo, tmp_path):
    (repo / ".git" / "HEAD").write_text("garbage\n")
    found, _ = record(repo, tmp_path)
    assert found.commit is None
    assert "git refuses" in found.note


def test_a_git_dir_from_a_hook_is_not_mistaken_for_the_packages(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(repo / ".git"))
    found, _ = record(repo, tmp_path)
    assert (found.commit, "GIT_DIR" in found.note) == (None, True)


def test_no_git_binary(repo, tmp_path):
    program = (
        "import sys; from pathlib import Path; from dino_exp.runs.code_identity import record_code as r;"
        "found = r(Path(sys.argv[1]), Path(sys.argv[2])); assert 'git' not in sys.modules; print(found.note)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(repo / "pkg"), str(tmp_path / "code")],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "no git binary\n"
