"""CIFAR-10 and CIFAR-100: 60,000 colour photographs of 32x32 pixels, from the archives of their authors.

The binary version is read, whose files are plain rows of bytes. The better-known Python version holds pickles, which
can run any code when they are loaded, and is never read.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html.

Shapes: N images, or rows of a file, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from dino_exp.data.datasets import ArrayDataset, DataError
from dino_exp.data.download import Tell, download
from dino_exp.errors import ConfigError

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 256 << 20  # of an archive; both have about 170 million

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class CifarFile:
    """One file of rows."""

    name: str
    split: Split
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """One of the two collections, as it is published.

    A row is one byte for each of `num_labels`, then the red, the green and the blue pixels, from top to bottom. The
    last label is the class of the image.
    """

    name: str
    title: str
    address: str
    md5: str  # of the archive
    folder: str  # in the archive, and where that was extracted
    num_labels: tuple[int, ...]
    files: tuple[CifarFile, ...]
    python_version: tuple[str, str]  # archive and folder of the pickles

    @property
    def archive(self) -> str:
        """Name of the archive."""
        return self.address.rpartition("/")[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return len(self.num_labels) + _PIXELS

    @property
    def num_classes(self) -> int:
        """Classes of the last label."""
        return self.num_labels[-1]

    def places(self, split: Split) -> dict[str, slice]:
        """Where the rows of each file of a part belong among its images, which are numbered in the order of `files`."""
        found, start = {}, 0
        for file in self.files:
            if file.split == split:
                found[file.name] = slice(start, start + file.num_rows)
                start += file.num_rows
        return found


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    num_labels=(10,),
    files=(
        *(CifarFile(name=f"data_batch_{number}.bin", split="train", num_rows=10_000) for number in range(1, 6)),
        CifarFile(name="test_batch.bin", split="val", num_rows=10_000),
    ),
    python_version=("cifar-10-python.tar.gz", "cifar-10-batches-py"),
)
CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    address="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    num_labels=(20, 100),  # superclass, class
    files=(
        CifarFile(name="train.bin", split="train", num_rows=50_000),
        CifarFile(name="test.bin", split="val", num_rows=10_000),
    ),
    python_version=("cifar-100-python.tar.gz", "cifar-100-python"),
)
COLLECTIONS = {collection.name: collection for collection in (CIFAR10, CIFAR100)}


def is_there(cifar: Cifar, root: Path) -> bool:
    """Whether the archive, or the folder that was extracted from it, lies in `root`."""
    return (root / cifar.archive).is_file() or (root / cifar.folder).is_dir()


def fetch_cifar(cifar: Cifar, root: Path, tell: Tell) -> None:
    """Download the archive into `root`, unless it or its extracted folder is there. Raises DataError, OSError."""
    if not is_there(cifar, root):
        download(cifar.address, root / cifar.archive, md5=cifar.md5, most_bytes=_MOST_BYTES, tell=tell)


def check_place(cifar: Cifar, root: Path, *, fetches: bool, root_key: str = "data.root") -> None:
    """Raise ConfigError, in the words of the setting `root_key`, where `root` cannot hold it, or does not and is to."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root_key}={root}: is no folder; expected the one that holds {cifar.title}, or will")
    if not fetches and not is_there(cifar, root):
        raise ConfigError(_absent(cifar, root, root_key))


def load_cifar(cifar: Cifar, root: Path, *, root_key: str = "data.root") -> tuple[ArrayDataset, ArrayDataset]:
    """The images to train on and the held-out ones, (N, 3, 32, 32) uint8, as published.

    Read from the archive in `root`, whose checksum is verified each time, or else from the folder that was extracted
    from it, whose files must have exactly their sizes. Both give the same data sets. Raises ConfigError where neither
    is there, saying `root_key`, by which a user names the folder; DataError for files that are not the published ones,
    OSError.
    """
    check_place(cifar, root, fetches=False, root_key=root_key)
    archive = root / cifar.archive
    contents = _read_archive(cifar, archive) if archive.is_file() else _read_folder(cifar, root / cifar.folder)
    places = {split: cifar.places(split) for split in SPLITS}
    numbers = {split: max(place.stop for place in places[split].values()) for split in SPLITS}
    images = {split: np.empty((numbers[split], *SHAPE), np.uint8) for split in SPLITS}
    labels = {split: np.empty(numbers[split], np.int64) for split in SPLITS}
    for file, data in contents:
        place = places[file.split][file.name]
        labels[file.split][place], images[file.split][place] = _rows(cifar, file, data)
    train, val = (
        ArrayDataset(
            name=f"{cifar.name}/{split}",
            version="1",
            num_classes=cifar.num_classes,
            images_NCHW=images[split],
            labels_N=labels[split],
        )
        for split in SPLITS
    )
    return train, val


def _read_archive(cifar: Cifar, path: Path) -> Iterator[tuple[CifarFile, bytes]]:
    """Every file with its bytes, in whatever order. Nothing is extracted; members of other names are passed over."""
    wanted = {f"{cifar.folder}/{file.name}": file for file in cifar.files}
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != cifar.md5:
            raise DataError(
                f"{path}: its MD5 is {found}, expected {cifar.md5}; it is damaged, or another file. Remove it, then "
                f"fetch {cifar.address} anew: data.download=true"
            )
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:gz") as archive:
            for member in archive:
                file = wanted.pop(member.name.removeprefix("./"), None) if member.isreg() else None
                content = None if file is None else archive.extractfile(member)
                if file is not None and content is not None:
                    yield file, _read_exactly(cifar, file, content, member.size, f"{path}: {member.name}")
    if wanted:
        raise DataError(f"{path}: expected {', '.join(wanted)} in it, and found none of that name")


def _read_folder(cifar: Cifar, folder: Path) -> Iterator[tuple[CifarFile, bytes]]:
    """Every file with its bytes."""
    for file in cifar.files:
        path = folder / file.name
        if not path.is_file():
            raise DataError(
                f"{folder}: {file.name} is missing, expected {_names(cifar)}; extract {cifar.archive} again, or remove "
                "the folder and keep the archive, which is read as it is"
            )
        with path.open("rb") as content:
            yield file, _read_exactly(cifar, file, content, path.stat().st_size, str(path))


def _read_exactly(cifar: Cifar, file: CifarFile, content: IO[bytes], num_bytes: int, where: str) -> bytes:
    expected = file.num_rows * cifar.row_bytes
    data = content.read(expected) if num_bytes == expected else b""
    if len(data) != expected:
        raise DataError(
            f"{where}: {len(data) if num_bytes == expected else num_bytes} bytes, expected {expected}, which are "
            f"{file.num_rows} rows of {cifar.row_bytes}; fetch it anew from {cifar.address}"
        )
    return data


def _rows(cifar: Cifar, file: CifarFile, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Classes (N,) and images (N, C, H, W) of a file. Raises DataError for a label out of its range."""
    rows = np.frombuffer(data, np.uint8).reshape(file.num_rows, cifar.row_bytes)
    for place, num in enumerate(cifar.num_labels):
        wrong = np.flatnonzero(rows[:, place] >= num)
        if len(wrong):
            raise DataError(
                f"{cifar.folder}/{file.name}: row {wrong[0]} has the label {rows[wrong[0], place]}, expected at most "
                f"{num - 1}; these are not the rows of {cifar.title}: fetch them anew from {cifar.address}"
            )
    start = len(cifar.num_labels)
    return rows[:, start - 1], rows[:, start:].reshape(-1, *SHAPE)


def _absent(cifar: Cifar, root: Path, root_key: str) -> str:
    """What to do where nothing is there."""
    lines = [
        f"data={cifar.name}: {cifar.title} is not in {root_key}={root}. Looked for the archive {root / cifar.archive}",
        f"and the folder {root / cifar.folder} with {_names(cifar)}.",
        f"To fetch it from {cifar.address} (about 170 MB), a training takes: data.download=true",
        f"If it lies elsewhere, name the folder that holds one of the two: {root_key}=<folder>",
    ]
    pickles = next((root / name for name in cifar.python_version if (root / name).exists()), None)
    if pickles is not None:
        lines.append(
            f"{pickles} is the Python version: it holds pickles, which can run any code, and is not read. Get "
            f"{cifar.archive}, the binary version of the same images"
        )
    return "\n".join(lines)


def _names(cifar: Cifar) -> str:
    return ", ".join(file.name for file in cifar.files)
