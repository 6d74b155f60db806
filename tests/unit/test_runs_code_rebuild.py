"""Recorded code is made again exactly, and nothing is run that the record does not name and vouch for."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from code_samples import clean_git, git, make_package, make_repository

from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs import code_rebuild, signature
from dino_exp.runs.code_identity import code_id, record_code
from dino_exp.runs.code_rebuild import rebuild_code, recorded_code
from dino_exp.runs.record import CodeRef
from dino_exp.runs.signature import own_key, sign


@pytest.fixture(autouse=True)
def _clean_git(monkeypatch):
    clean_git(monkeypatch)


class Recorded:
    """Code that was recorded, in a repository that went on to other code since."""

    def __init__(self, root: Path, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = tmp_path / "run" / "code", tmp_path / "out"
        self.record = record_code(root / package, self.folder)
        self.ref = CodeRef(id=self.record.id, commit=self.record.commit, dirty=self.record.dirty)
        (root / package / "since.py").write_text("since = 1\n")
        monkeypatch.setattr(code_rebuild, "PACKAGE_DIR", root / package)

    def code(self):
        return recorded_code(self.folder, 1, self.ref)

    def rebuild(self) -> Path:
        """The package as it was made again."""
        place = rebuild_code(self.code(), self.out)
        (package,) = [path for path in place.iterdir() if (path / "__init__.py").exists() or path.name == "pkg"]
        return package

    def edit(self, **changes) -> None:
        path = self.folder / "git.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(root: Path, package: str = "pkg") -> None:
    (root / package / "__init__.py").write_text("x = 5\n")


def context(root: Path) -> None:
    (root / "pkg" / "__init__.py").write_text("".join(f"x{i} = 1\n" for i in range(20)))
    git(root, "commit", "-am", "longer")
    git(root, "config", "diff.context", "0")
    git(root, "config", "diff.interHunkContext", "9")
    (root / "pkg" / "__init__.py").write_text("".join(f"x{i} = {i % 9}\n" for i in range(20)))


def ignored(root: Path) -> None:
    (root / ".git" / "info" / "exclude").write_text("_version.py\n")
    (root / "pkg" / "_version.py").write_text("v = 1\n")


def assumed(root: Path) -> None:
    git(root, "update-index", "--assume-unchanged", "pkg/__init__.py")
    change(root)


def linked(root: Path) -> None:
    (root / "elsewhere.py").write_text("z = 1\n")
    (root / "pkg" / "link.py").symlink_to("../elsewhere.py")


def converted(root: Path) -> None:
    git(root, "config", "core.autocrlf", "true")
    (root / "pkg" / "__init__.py").write_bytes(b"x = 5\r\n")


def filtered(root: Path) -> None:
    (root / ".gitattributes").write_text("*.py filter=upper\n")
    git(root, "config", "filter.upper.clean", "tr A-Z a-z")
    (root / "pkg" / "__init__.py").write_bytes(b"X = 1\n")  # to git it is as the commit has it


@pytest.mark.parametrize("disturb", [change, context, ignored, assumed, linked, converted, filtered])
def test_whatever_git_was_told_the_code_is_made_again(disturb, tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    disturb(root)
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    assert recorded.record.dirty
    assert code_id(recorded.rebuild()) == recorded.record.id


def test_settings_of_the_environment_make_no_other_patch(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    context(root)
    monkeypatch.setenv("GIT_DIFF_OPTS", "-u0")
    monkeypatch.setenv("GIT_LITERAL_PATHSPECS", "1")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    assert code_id(recorded.rebuild()) == recorded.record.id


@pytest.mark.parametrize("package", ["my project/pkg", "prüfung/pkg", ""])
def test_a_package_lies_wherever_it_likes(package, tmp_path, monkeypatch):
    root = make_repository(tmp_path / "pkg", package)
    change(root, package)
    recorded = Recorded(root, package, tmp_path, monkeypatch)
    assert code_id(recorded.rebuild()) == recorded.record.id


def test_a_repository_without_a_commit(tmp_path, monkeypatch):
    root = tmp_path / "project"
    make_package(root)
    git(root, "init", "--initial-branch=main")
    git(root, "add", "pkg")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    assert code_id(recorded.rebuild()) == recorded.record.id


def test_a_shallow_clone_lends_a_commit_that_no_branch_has(tmp_path, monkeypatch):
    source, root = make_repository(tmp_path / "source"), tmp_path / "project"
    git(source, "commit", "--allow-empty", "-m", "second")
    git(tmp_path, "clone", "--depth", "1", f"file://{source}", str(root))
    change(root)
    git(root, "commit", "-am", "third")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    git(root, "commit", "--amend", "-m", "another third")
    before = sorted(str(path) for path in (root / ".git").rglob("*"))
    assert code_id(recorded.rebuild()) == recorded.record.id
    assert sorted(str(path) for path in (root / ".git").rglob("*")) == before


def test_code_of_no_repository_needs_an_installation_of_it(tmp_path, monkeypatch):
    make_package(tmp_path / "project")
    recorded = Recorded(tmp_path / "project", "pkg", tmp_path, monkeypatch)
    with pytest.raises(RefusedError, match=rf"was not in a git repository.*code_id is {recorded.record.id}"):
        recorded.rebuild()


def test_code_that_could_not_be_kept_is_named(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    git(root, "update-index", "--skip-worktree", "pkg/sub/a.py")
    (root / "pkg" / "sub" / "a.py").unlink()
    (root / "pkg" / "big.py").write_text("#" * 1_000_001)
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    assert "in the commit and not on the disk, which no patch tells: pkg/sub/a.py" in recorded.record.note
    assert "code that could not be kept: pkg/big.py" in recorded.record.note
    with pytest.raises(RefusedError, match="was not kept is missing"):
        recorded.rebuild()


def test_the_record_is_that_of_the_run(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    git(root, "add", ".")
    git(root, "commit", "-m", "second")
    recorded.edit(id=code_id(root / "pkg"), commit=git(root, "rev-parse", "HEAD"))
    with pytest.raises(RefusedError, match="one of the two is not of this run"):
        recorded.code()
    recorded.edit(id=recorded.record.id)
    with pytest.raises(RefusedError, match="one of the two is not of this run"):
        recorded.code()


def packed(*files: tuple[str, bytes], link: bool = False) -> bytes:
    """A gzipped tar of these files; of a link in the place of the last one."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for number, (name, content) in enumerate(files):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if link and number == len(files) - 1:
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def listed(*files: tuple[str, bytes]) -> list[dict[str, object]]:
    return [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files
    ]


NOTES, EVIL = ("notes.txt", b"hi"), ("sitecustomize.py", b"1/0")


@pytest.mark.parametrize(
    ("archive", "names", "says"),
    [
        (packed(NOTES, EVIL), [NOTES], "'sitecustomize.py' is not as"),
        (packed((NOTES[0], b"ho")), [NOTES], "'notes.txt' is not as"),
        (packed(NOTES), [NOTES, EVIL], "'sitecustomize.py' is not as"),
        (packed(NOTES, ("x", b""), link=True), [NOTES], "no regular file"),
        (packed((".git/hooks/x", b"")), [(".git/hooks/x", b"")], "inside the repository"),
        (packed(("a/.GIT/x", b"")), [("a/.GIT/x", b"")], "inside the repository"),
        (packed(("../x", b"")), [("../x", b"")], "inside the repository"),
        (packed(("/x", b"")), [("/x", b"")], "inside the repository"),
        (b"no archive", [NOTES], "cannot be unpacked"),
    ],
)
def test_exactly_the_listed_files_are_unpacked(archive, names, says, tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    (recorded.folder / "untracked.tar.gz").write_bytes(archive)
    digest = hashlib.sha256(archive).hexdigest()
    recorded.edit(untracked={"sha256": digest, "files": listed(*names)})
    with pytest.raises(DamagedFileError, match=says):
        recorded.rebuild()
    assert not (recorded.out / "notes.txt").exists()


def test_archive_and_patch_are_those_of_the_record(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    change(root)
    (root / "notes.txt").write_text("hi")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    for name in ("code.patch", "untracked.tar.gz"):
        path = recorded.folder / name
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        with pytest.raises(DamagedFileError, match=f"{name}: is not what was recorded"):
            recorded.rebuild()
        path.write_bytes(content)
        shutil.rmtree(recorded.out)
    recorded.rebuild()


def test_no_file_is_written_through_a_link_of_the_patch(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    (root / "pkg" / "away").symlink_to(tmp_path)
    git(root, "add", ".")
    recorded = Recorded(root, "pkg", tmp_path, monkeypatch)
    archive = packed(("pkg/away/x.txt", b""))
    (recorded.folder / "untracked.tar.gz").write_bytes(archive)
    digest = hashlib.sha256(archive).hexdigest()
    recorded.edit(untracked={"sha256": digest, "files": listed(("pkg/away/x.txt", b""))})
    with pytest.raises(RefusedError, match="behind a link"):
        recorded.rebuild()
    assert not (tmp_path / "x.txt").exists()


def test_a_record_is_ones_own_if_ones_key_signed_it(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "project")
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    assert own_key(environ) is None
    key = own_key(environ, make=True)
    assert key is not None
    assert own_key(environ) == own_key(environ, make=True) == key
    assert (tmp_path / "state" / "dino_exp" / "key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "state" / "dino_exp").iterdir()] == ["key"]
    record = record_code(root / "pkg", tmp_path / "code", sign=lambda described: sign(key, "run-1", described))
    ref = CodeRef(id=record.id, commit=record.commit, dirty=False)
    code = recorded_code(tmp_path / "code", 1, ref)
    assert code.is_signed(key, "run-1")
    assert not code.is_signed(key, "run-2")
    assert not code.is_signed(None, "run-1")
    assert not code.is_signed(bytes(32), "run-1")
    with (tmp_path / "code" / "git.json").open("a") as file:
        file.write("\n")
    assert not recorded_code(tmp_path / "code", 1, ref).is_signed(key, "run-1")


def test_a_home_that_takes_no_key_leaves_code_unsigned(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("a file")
    assert own_key({"XDG_STATE_HOME": str(tmp_path / "state")}, make=True) is None
    monkeypatch.setattr(signature.os.path, "expanduser", lambda path: "/proc/no/such/place")
    assert own_key({}, make=True) is None
