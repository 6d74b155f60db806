"""Which images a folder holds, in which order, and when its digest changes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import encoded, listing_of, picture, small_tree, write

from dino_exp.data.files import listing as module
from dino_exp.data.files.listing import Listing, current_listing, name_of, shown
from dino_exp.errors import DataError, UsageError

JPEG = encoded(picture(), "JPEG")


def paths(listing: Listing) -> list[bytes]:
    return [listing.path(number) for number in range(len(listing))]


def test_images_come_in_the_order_of_the_bytes_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "a-/1.jpeg", "a/x/2.webp", "a/10.png", "a/2.PNG", "Z.JPG", "é.jpg", "a/notes.txt", "a/jpg"):
        write(tmp_path / name, JPEG)
    listing = listing_of(tmp_path)
    assert paths(listing) == [
        b"Z.JPG", b"a-/1.jpeg", b"a/10.png", b"a/2.PNG", b"a/x/2.webp", b"b/1.jpg", "é.jpg".encode(),
    ]  # fmt: skip
    assert listing.sizes_N.tolist() == [len(JPEG)] * 7
    assert listing.read(3) == JPEG
    assert listing.full_path(3) == os.fsencode(tmp_path / "a/2.PNG")


def test_what_is_hidden_is_passed_over_and_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("a.jpg", ".b.jpg", ".git/c.jpg", "d/.e/f.jpg", "d/g.jpg"):
        write(tree / name, JPEG)
    elsewhere = write(tmp_path / "elsewhere/h.jpg", JPEG)
    (tree / "file.jpg").symlink_to(elsewhere)
    (tree / "folder").symlink_to(elsewhere.parent)
    (tree / "loop").symlink_to(tree)
    (tree / "loop.jpg").symlink_to(tree)
    assert paths(listing_of(tree)) == [b"a.jpg", b"d/g.jpg", b"file.jpg"]
    assert listing_of(tree).read(2) == JPEG


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", JPEG)
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"b\.jpg: is a link to a file that is not there"):
        listing_of(tmp_path)


def test_pictures_that_the_program_has_made_are_no_data(tmp_path: Path) -> None:
    for name in ("a.jpg", "evaluations/b.jpg", "runs/c.jpg", "evaluations/run/step-1/d.jpg"):
        write(tmp_path / name, JPEG)
    first = listing_of(tmp_path)
    assert len(first) == 4
    for name in ("outputs/evaluations", "evaluations"):
        write(tmp_path / name / "run/step-000000003/attention.png", JPEG)
    write(tmp_path / "outputs/runs/run/config.canonical.json", b"{}")
    write(tmp_path / "outputs/runs/run/wandb/media/accuracy.png", JPEG)
    assert listing_of(tmp_path).digest == first.digest
    assert len(listing_of(tmp_path / "evaluations/run/step-000000003")) == 1  # asked for by name


def refuses(name: str, number: int) -> Any:
    """A call of the system that fails for one path."""

    def call(path: Any, *more: Any, **words: Any) -> Any:
        if os.fsencode(path).endswith(os.fsencode(name)):
            raise OSError(number, os.strerror(number), path)
        return real(path, *more, **words)

    real = os.scandir
    return call


def test_what_cannot_be_looked_at_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a/1.jpg", JPEG)
    loop = tmp_path / "a/self.jpg"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=rf"^{loop}: is a link that leads to no file \(Too many levels .* remove it"):
        listing_of(tmp_path)
    loop.unlink()
    for number, expected in (
        (errno.EACCES, r"a/: cannot be looked at \(Permission denied\); make it readable, or take it out"),
        (errno.ENOENT, r"a/: went away while it was looked at: .* Start again"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module.os, "scandir", refuses("a/", number))
            with pytest.raises(DataError, match=expected):
                listing_of(tmp_path)


def test_a_root_that_is_no_folder_or_closed_is_not_called_missing(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jpg", JPEG)
    with pytest.raises(UsageError, match=r"a\.jpg: is no folder; expected the folder that the images lie in"):
        listing_of(path)
    with pytest.raises(UsageError, match=r"below: cannot be looked at \(Not a directory\)"):
        listing_of(path / "below")


def test_names_that_go_into_digests_depend_on_no_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsdecode", lambda path: path.decode("ascii", "surrogateescape"))
    assert shown("é".encode()) != "é"
    assert [name_of(name) for name in (b"a b-1", "é".encode(), b"\xff")] == ["a b-1", "é", "\udcff"]


def test_a_part_is_a_listing_and_all_of_it_the_same_one(tmp_path: Path) -> None:
    listing = listing_of(small_tree(tmp_path, 6))
    assert listing.part(np.arange(6)) is listing
    part = listing.part(np.array([1, 4]))
    assert paths(part) == [listing.path(1), listing.path(4)]
    assert [part.read(number) for number in (0, 1)] == [listing.read(1), listing.read(4)]
    assert len({listing.digest, part.digest, listing.part(np.array([1, 5])).digest}) == 3


def test_names_need_not_be_text(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff\n.jpg", "wb") as file:  # noqa: PTH123
        file.write(JPEG)
    listing = listing_of(tmp_path)
    assert paths(listing) == [b"\xff\n.jpg"]
    assert listing.read(0) == JPEG
    assert shown(listing.path(0)) == r"\udcff\n.jpg"


def test_a_folder_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        listing_of(tmp_path / "gone")
    write(tmp_path / "notes.txt", b"")
    with pytest.raises(UsageError, match=r"holds no images; expected files that end in \.jpg"):
        listing_of(tmp_path)


def test_the_digest_is_of_names_sizes_and_contents_and_of_no_place(tmp_path: Path) -> None:
    first = listing_of(small_tree(tmp_path / "one")).digest
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert listing_of(tmp_path / "two").digest == first
    (tmp_path / "two/a/000.jpg").rename(tmp_path / "two/a/00.jpg")
    renamed = listing_of(tmp_path / "two").digest
    data = bytearray((tmp_path / "one/b/001.jpg").read_bytes())
    data[-3] ^= 1
    write(tmp_path / "one/b/001.jpg", bytes(data))
    assert len({first, renamed, listing_of(tmp_path / "one").digest}) == 3


def test_of_large_sets_names_and_sizes_are_digested_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTENT_BYTES", 1000)
    root = small_tree(tmp_path)
    first = listing_of(root).digest
    path = root / "b/001.jpg"
    write(path, bytes(len(path.read_bytes())))
    assert listing_of(root).digest == first
    write(path, b"shorter")
    assert listing_of(root).digest != first


def test_files_side_by_side_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    digests = set()
    for number, names in enumerate((("ab.jpg", "c.jpg"), ("a.jpg", "bc.jpg"), ("a.jpg", "b/c.jpg"))):
        for name in names:
            write(tmp_path / str(number) / name, JPEG)
        digests.add(listing_of(tmp_path / str(number)).digest)
    assert len(digests) == 3


def test_a_file_that_changes_after_the_listing_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", JPEG)
    listing = listing_of(tmp_path)
    write(path, JPEG + b"more")
    with pytest.raises(DataError, match=rf"a\.jpg: has {len(JPEG) + 4} bytes, and had {len(JPEG)} at the start"):
        listing.read(0)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read \(No such file or directory\)"):
        listing.read(0)
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"a\.jpg: is no file any more"):
        listing.read(0)


@pytest.mark.parametrize("content_bytes", [0, 1 << 20])
def test_a_second_look_walks_again_only_if_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_bytes: int
) -> None:
    monkeypatch.setattr(module, "CONTENT_BYTES", content_bytes)
    root = small_tree(tmp_path)
    first = current_listing(str(root))
    assert current_listing(str(root)) is first
    write(root / "a/new.jpg", JPEG)
    second = current_listing(str(root))
    assert len(second) == len(first) + 1
    os.utime(root / "a/new.jpg", ns=(1, 1))
    assert (current_listing(str(root)) is second) == (content_bytes == 0)
    (root / "a/new.jpg").unlink()
    assert current_listing(str(root)).digest == first.digest


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TELL_EVERY", 2)
    told: list[tuple[str, int, int | None]] = []
    current_listing(str(small_tree(tmp_path, 6)), lambda *words: told.append(words))
    assert {word for word, _, _ in told} == {"looking for images", "reading images"}
    assert told[-1] == ("reading images", 4, 6)


def test_a_listing_is_small(tmp_path: Path) -> None:
    listing = listing_of(small_tree(tmp_path))
    assert isinstance(listing.paths, bytes)
    assert listing.ends_N.dtype == listing.sizes_N.dtype == np.int64
