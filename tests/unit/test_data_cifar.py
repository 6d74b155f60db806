"""CIFAR from archives and folders of few rows in the real format; what is damaged, missing or a pickle is told."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from config_examples import config
from support.cifar_files import SMALL10, SMALL100, contents, write_archive, write_folder

from dino_exp import build
from dino_exp.data.cifar import CIFAR10, CIFAR100, COLLECTIONS, Cifar, load_cifar
from dino_exp.data.datasets import DataError
from dino_exp.errors import ConfigError

BOTH = pytest.mark.parametrize("cifar", [SMALL10, SMALL100], ids=lambda cifar: cifar.name)


@BOTH
def test_images_and_classes_are_those_of_the_rows(cifar: Cifar, tmp_path: Path) -> None:
    train, val = load_cifar(write_archive(cifar, tmp_path), tmp_path)
    files = contents(cifar)
    ordered = b"".join(files[file.name] for file in cifar.files if file.split == "train")
    rows = np.frombuffer(ordered, np.uint8).reshape(-1, cifar.row_bytes)
    assert np.array_equal(train.images_NCHW.reshape(len(train), -1), rows[:, -3072:])
    assert np.array_equal(train.labels_N, rows[:, len(cifar.num_labels) - 1])
    assert (train.name, val.name) == (f"{cifar.name}/train", f"{cifar.name}/val")
    assert train.num_classes == val.num_classes == {"cifar10": 10, "cifar100": 100}[cifar.name]
    last = files[cifar.files[-1].name]
    assert val.images_NCHW[-1, 2, 31, 31] == last[-1]  # the last byte is the last blue pixel
    assert val.images_NCHW[0, 0, 0, 1] == last[len(cifar.num_labels) + 1]


@BOTH
def test_archive_and_folder_are_the_same_data_set(cifar: Cifar, tmp_path: Path) -> None:
    write_folder(cifar, tmp_path / "folder")
    from_folder = load_cifar(cifar, tmp_path / "folder")
    from_archive = load_cifar(write_archive(cifar, tmp_path / "archive"), tmp_path / "archive")
    assert [part.fingerprint() for part in from_folder] == [part.fingerprint() for part in from_archive]
    assert sorted(path.name for path in (tmp_path / "archive").iterdir()) == [cifar.archive]  # nothing was extracted


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    folder = write_folder(SMALL10, tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / SMALL10.folder).symlink_to(folder)
    assert len(load_cifar(SMALL10, tmp_path / "data")[0]) == 250


def test_the_published_sizes_are_demanded() -> None:
    sizes = {file.name: file.num_rows * CIFAR10.row_bytes for file in CIFAR10.files}
    assert set(sizes.values()) == {30_730_000}
    assert list(sizes) == [*(f"data_batch_{number}.bin" for number in (1, 2, 3, 4, 5)), "test_batch.bin"]
    assert {file.name: file.num_rows * CIFAR100.row_bytes for file in CIFAR100.files} == {
        "train.bin": 153_700_000,
        "test.bin": 30_740_000,
    }


def refusal(cifar: Cifar, root: Path, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load_cifar(cifar, root)
    return str(caught.value)


def test_what_is_not_there_is_told_with_the_line_to_type(tmp_path: Path) -> None:
    text = refusal(CIFAR10, tmp_path, ConfigError)
    for part in (CIFAR10.address, str(tmp_path / CIFAR10.archive), str(tmp_path / CIFAR10.folder), "test_batch.bin"):
        assert part in text
    assert "data.download=true" in text
    assert "pickle" not in text


@pytest.mark.parametrize("name", ["cifar-100-python.tar.gz", "cifar-100-python"])
def test_pickles_are_named_and_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.") if name.endswith("gz") else (tmp_path / name).mkdir()
    text = refusal(CIFAR100, tmp_path, ConfigError)
    assert f"{tmp_path / name} is the Python version: it holds pickles" in text
    assert "Get cifar-100-binary.tar.gz" in text


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    folder = write_folder(SMALL10, tmp_path)
    data = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert f"data_batch_3.bin: {153_650 + change} bytes, expected 153650" in refusal(SMALL10, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write_folder(SMALL10, tmp_path) / "test_batch.bin").unlink()
    assert "test_batch.bin is missing" in refusal(SMALL10, tmp_path)


@pytest.mark.parametrize(("place", "value"), [(0, 20), (1, 100)])
def test_a_label_out_of_range_is_refused(tmp_path: Path, place: int, value: int) -> None:
    path = write_folder(SMALL100, tmp_path) / "test.bin"
    data = bytearray(path.read_bytes())
    data[7 * SMALL100.row_bytes + place] = value
    path.write_bytes(data)
    text = refusal(SMALL100, tmp_path)
    assert f"test.bin: row 7 has the label {value}, expected at most {value - 1}" in text


def test_an_archive_with_a_flipped_byte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    cifar = write_archive(SMALL10, tmp_path)
    path = tmp_path / cifar.archive
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    text = refusal(cifar, tmp_path)
    assert f"expected {cifar.md5}" in text
    assert "Remove it" in text


def test_an_archive_without_a_file_is_refused(tmp_path: Path) -> None:
    files = contents(SMALL10)
    del files["data_batch_2.bin"]
    assert "expected cifar-10-batches-bin/data_batch_2.bin" in refusal(
        write_archive(SMALL10, tmp_path, files), tmp_path
    )


def test_links_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(contents(SMALL10)["test_batch.bin"])
    path = tmp_path / SMALL10.archive
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo(f"{SMALL10.folder}/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret"
        archive.addfile(link)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    assert "test_batch.bin" in refusal(replace(SMALL10, md5=digest), tmp_path)


@pytest.fixture
def sparse() -> Callable[[Path], None]:
    """Files of the real sizes without content, which take no place."""

    def make(root: Path) -> None:
        folder = root / CIFAR10.folder
        folder.mkdir(parents=True)
        for file in CIFAR10.files:
            with (folder / file.name).open("wb") as empty:
                os.truncate(empty.fileno(), file.num_rows * CIFAR10.row_bytes)

    return make


def test_the_settings_lead_to_the_published_collection(tmp_path: Path, sparse: Callable[[Path], None]) -> None:
    sparse(tmp_path)
    how = build.Preparation(cache=tmp_path / "cache")
    made = build.build_data(config("data=cifar10", "augment=dino", f"data.root={tmp_path}").data, how)
    assert (len(made.train), len(made.val), made.train.num_classes) == (50_000, 10_000, 10)
    with pytest.raises(ConfigError, match=r"data=cifar100: CIFAR-100 is not in data\.root"):
        build.build_data(config("data=cifar100", "augment=dino", f"data.root={tmp_path}").data, how)
    assert list(COLLECTIONS) == ["cifar10", "cifar100"]
    (tmp_path / "file").write_text("")
    for download in ("true", "false"):
        words = (f"data.root={tmp_path / 'file'}", f"data.download={download}")
        with pytest.raises(ConfigError, match=r"data\.root=.*file: is no folder; expected the one that holds CIFAR-10"):
            build.build_data(config("data=cifar10", "augment=dino", *words).data, how)


def test_where_it_lies_makes_no_other_run() -> None:
    from dino_exp.config.canonical import config_hash

    elsewhere = ("data.root=/x", "data.download=true")
    hashes = {config_hash(config("data=cifar10", "augment=dino", *words)) for words in ((), elsewhere)}
    assert len(hashes) == 1
    assert config_hash(config("data=cifar100", "augment=dino")) not in hashes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("augment=dino", "train.batch_size=50001"), "more than the 50000 training images of data=cifar10"),
        (("augment=digits",), "data=cifar10 is in colour: use augment=dino"),
        (("augment=dino", "data.root=null"), r"add data\.root=<folder>"),
        (("augment=dino", "data.cache=true"), "data=cifar10, which needs no decoding"),
        (("data=synthetic", "data.download=true"), "data=synthetic, which is not fetched"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("data=cifar10", *words) if "data=synthetic" not in words else config(*words)
